"""What the file says: which bytes are which expert, what ggml makes of it, and which files are its copies."""
