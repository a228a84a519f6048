"""A model in a server: sequences that share a context, conversations that survive, the OpenAI API, a page, metrics."""
