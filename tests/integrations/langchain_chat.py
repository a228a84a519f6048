"""LangChain: ChatLlamaCpp and LlamaCpp of langchain-community, whole answers and streams, a chain."""

import sys

from langchain_community.chat_models import ChatLlamaCpp
from langchain_community.llms import LlamaCpp
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

chat = ChatLlamaCpp(model_path=sys.argv[1], n_ctx=512, max_tokens=24, temperature=0, verbose=False)
print(chat.invoke("What is the capital of France?").content)
print("".join(chunk.content for chunk in chat.stream("What is the capital of France?")))
chain = ChatPromptTemplate.from_messages([("user", "What is the capital of {country}?")]) | chat | StrOutputParser()
print(chain.batch([{"country": "Germany"}, {"country": "Italy"}], {"max_concurrency": 1}))  # two threads would crash a plain Llama

llm = LlamaCpp(model_path=sys.argv[1], n_ctx=512, max_tokens=12, temperature=0, verbose=False)
print(llm.invoke("The capital of France is"))
print("".join(llm.stream("The capital of France is")))
