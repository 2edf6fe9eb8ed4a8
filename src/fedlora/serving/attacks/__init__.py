"""What a run tells about its rows, measured by attacks on it; its own run folder is all that they take."""
