"""guidance: text in between, a choice and a pattern that the model is held to."""

import sys

from guidance import gen, models, select

model = models.LlamaCpp(sys.argv[1], n_ctx=512, echo=False)
model += "The capital of France is" + gen("city", max_tokens=6, temperature=0)
print(model["city"])
model += "\nParis is in " + select(["Germany", "France"], name="country") + ". It has " + gen("number", regex=r"\d{1,3}") + " bridges."
print(model["country"], model["number"])
