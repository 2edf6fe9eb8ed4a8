"""Speed beside the peers, on the same work: see run.py. Every system is a process of its own; rounds alternate between them."""
