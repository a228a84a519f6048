"""OpenAI's own client at a server: whole, streamed, held to a schema, a tool, embeddings, several at once."""

import asyncio
import json
import sys

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    country: str


where = {"base_url": sys.argv[1], "api_key": "none"}
client = OpenAI(**where)
model = client.models.list().data[0].id
question = [{"role": "user", "content": "What is the capital of France?"}]
print(client.chat.completions.create(model=model, messages=question, max_tokens=24, temperature=0).choices[0].message.content)
stream = client.chat.completions.create(model=model, messages=question, max_tokens=24, temperature=0, stream=True)
print("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
print(client.completions.create(model=model, prompt="The capital of France is", max_tokens=8, temperature=0).choices[0].text)

if "--plain-fields" not in sys.argv:  # llama_cpp.server knows no json_schema
    about = [{"role": "user", "content": "Name the capital of France and its country, as JSON."}]
    print("schema:", client.chat.completions.parse(model=model, messages=about, max_tokens=64, temperature=0, response_format=City).choices[0].message.parsed)

    tool = {"type": "function", "function": {"name": "weather", "description": "The weather in a city.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
    asked = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "How is the weather in Paris?"}], max_tokens=64,
                                           temperature=0, tools=[tool], tool_choice={"type": "function", "function": {"name": "weather"}})
    call = asked.choices[0].message.tool_calls[0].function
    print("tool:", call.name, sorted(json.loads(call.arguments)))
    print("embeddings:", [len(each.embedding) > 0 for each in client.embeddings.create(model=model, input=["Paris", "Berlin"]).data])


async def several():
    """Ask two things at once."""
    async with AsyncOpenAI(**where) as client:
        return await asyncio.gather(*[client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": f"What is the capital of {country}?"}], max_tokens=12, temperature=0)
            for country in ("France", "Germany")])


print("at once:", [answer.choices[0].message.content for answer in asyncio.run(several())])
