"""instructor without a server: it patches the function of a Llama that the program makes."""

import sys

import instructor
import llama_cpp
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    country: str


llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, verbose=False)
create = instructor.patch(create=llm.create_chat_completion_openai_v1, mode=instructor.Mode.TOOLS)
print(create(messages=[{"role": "user", "content": "Name the capital of France and its country."}], response_model=City, max_tokens=64, temperature=0))
