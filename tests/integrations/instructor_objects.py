"""instructor: objects from a server, in its modes for a JSON schema and for tools, and one built up while it streams."""

import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    country: str


about = [{"role": "user", "content": "Name the capital of France and its country."}]
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    client = instructor.from_openai(OpenAI(base_url=sys.argv[1], api_key="none"), mode=mode)
    print(mode.name, client.create(model="any", messages=about, response_model=City, max_tokens=64, temperature=0))
client = instructor.from_openai(OpenAI(base_url=sys.argv[1], api_key="none"), mode=instructor.Mode.JSON_SCHEMA)
*_, whole = client.create_partial(model="any", messages=about, response_model=City, max_tokens=64, temperature=0)
print("streamed", whole)
