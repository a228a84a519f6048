"""LlamaIndex: LlamaCPP of llama-index-llms-llama-cpp, completions and chat, whole and streamed."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.llama_cpp import LlamaCPP

llm = LlamaCPP(model_path=sys.argv[1], temperature=0, max_new_tokens=24, context_window=512, verbose=False)
print(llm.complete("The capital of France is").text)
print("".join(chunk.delta for chunk in llm.stream_complete("The capital of France is")))
question = [ChatMessage(role="user", content="What is the capital of France?")]
print(llm.chat(question).message.content)
print("".join(chunk.delta for chunk in llm.stream_chat(question)))
