"""Haystack: LlamaCppChatGenerator of llama-cpp-haystack in a pipeline, whole and streamed."""

import sys

from haystack import Pipeline
from haystack.components.builders import ChatPromptBuilder
from haystack.dataclasses import ChatMessage
from haystack_integrations.components.generators.llama_cpp import LlamaCppChatGenerator

generator = LlamaCppChatGenerator(model=sys.argv[1], n_ctx=512, generation_kwargs={"max_tokens": 24, "temperature": 0})
pipeline = Pipeline()
pipeline.add_component("prompt", ChatPromptBuilder([ChatMessage.from_user("What is the capital of {{country}}?")], required_variables="*"))
pipeline.add_component("llm", generator)
pipeline.connect("prompt.prompt", "llm.messages")
print(pipeline.run({"prompt": {"country": "France"}})["llm"]["replies"][0].text)

pieces = []
generator.run([ChatMessage.from_user("What is the capital of Germany?")], streaming_callback=lambda chunk: pieces.append(chunk.content))
print("".join(pieces))
generator.close()
