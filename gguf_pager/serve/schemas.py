"""What the API takes: OpenAI's fields, and those of llama_cpp.server. What is not known is let pass, as OpenAI's clients expect."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_CHOICES = 16
"""Answers to one prompt."""

MOST_ANSWERS = 256
"""Answers to one request of several prompts."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    stream: bool = False
    user: str | None = None


class StreamOptions(BaseModel):
    """What a stream brings besides its text."""

    include_usage: bool = False


class _Generation(_Request):
    """How tokens are chosen. Defaults are those of llama_cpp.server, but for the penalty of repetitions, which is off."""

    temperature: float | None = Field(0.8, ge=0)
    top_p: float | None = Field(0.95, ge=0, le=1)
    min_p: float | None = Field(0.05, ge=0, le=1)
    top_k: int | None = Field(40, ge=0)
    typical_p: float | None = Field(1.0, ge=0, le=1)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    repeat_penalty: float | None = Field(1.0, gt=0)
    mirostat_mode: int | None = Field(0, ge=0, le=2)
    mirostat_tau: float | None = Field(5.0, ge=0, le=10)
    mirostat_eta: float | None = Field(0.1, ge=0.001, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=0)
    logit_bias: dict[str, float] | None = None
    grammar: str | None = None
    n: int | None = Field(1, ge=1, le=MOST_CHOICES)
    stream_options: StreamOptions | None = None


SAMPLING = ("temperature", "top_p", "min_p", "top_k", "typical_p", "presence_penalty", "frequency_penalty", "repeat_penalty",
            "mirostat_mode", "mirostat_tau", "mirostat_eta", "seed", "stop")
"""Fields that llama_cpp takes by the same names. One that is null is as by default."""

Text = str | list[str] | list[int] | list[list[int]]


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: Text = ""
    suffix: str | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)


class JsonSchema(BaseModel):
    """OpenAI's wrapping of a JSON schema."""

    model_config = ConfigDict(extra="ignore")
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ResponseFormat(BaseModel):
    """`text`, any JSON, or JSON of a schema: OpenAI's way, or with `schema` beside `json_object` as llama_cpp.server has it."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class Message(BaseModel):
    """One message of a conversation, of whatever role the model's template knows."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_format: str | None = None
    reasoning_effort: str | None = None


class EmbeddingRequest(_Request):
    """POST /v1/embeddings."""

    input: Text
    encoding_format: Literal["float", "base64"] = "float"


class TokenizeRequest(_Request):
    """POST /extras/tokenize and /extras/tokenize/count."""

    input: str


class DetokenizeRequest(_Request):
    """POST /extras/detokenize."""

    tokens: list[int]
