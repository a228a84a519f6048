"""outlines: free text, a choice and a schema that its own logits processor holds the model to, and a stream."""

import sys
from typing import Literal

import llama_cpp
import outlines
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    country: Literal["France", "Germany"]


model = outlines.from_llamacpp(llama_cpp.Llama(sys.argv[1], n_ctx=512, verbose=False))
print(model("The capital of France is", max_tokens=12, temperature=0))
print(model("Is Paris in France or in Germany? It is in ", Literal["France", "Germany"], temperature=0))
print(City.model_validate_json(model("A city, as JSON: Paris, France.", City, max_tokens=64, temperature=0)))
print("".join(model.stream("The capital of France is", max_tokens=12, temperature=0)))
