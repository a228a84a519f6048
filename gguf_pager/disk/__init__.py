"""The disk that holds a model: which ways of reading it there are, how fast each is, and which is remembered as the best."""
