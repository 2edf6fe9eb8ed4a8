"""The delimiters that data.delimiter knows by name or by itself."""

DELIMITERS = ",;\t|"  # what "auto" chooses from
WORDS = {"tab": "\t"}  # one that is hard to type in a shell
