"""The builder of answers with fields: keyed by the prompt, typed by a pydantic model that the user's builder declares.

Owns the request's schema, the check of an answer, and the one repair. How a call is made, retried and priced is the
model's affair.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from featurekit_spark.builder import FeatureBuilder, Metered
from featurekit_spark.costs import Pricing
from featurekit_spark.errors import BuildError, ContextError, DefinitionError, FeaturekitError
from featurekit_spark.llm.base import ChatModel, Completion, Message
from featurekit_spark.llm.completion import RequestPricing
from featurekit_spark.paid.cost import NOTHING, Cost, cost_of
from featurekit_spark.values import value_type

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["StructuredCompletion"]


class StructuredCompletion(FeatureBuilder[dict[str, Any]]):
    """prompt -> the model's answer with the fields of `response`, by `context.llm`. Subclass it:

        class Verdict(BaseModel):
            mood: Literal["calm", "loud"]
            reasons: list[str]

        class ProductVerdict(StructuredCompletion):
            response = Verdict
            system = "You judge products."

    Key and value type follow from it: the value is a struct of the model's fields. The JSON Schema goes with the
    request and is part of its identity, as is all else that is sent. An answer that does not fit is sent back once
    with what is wrong; one that does not fit then is an error of its key, its text kept beside it.

    Validators of your own are not part of the identity. Where a change of theirs should pay again, declare a `version`
    and raise it.
    """

    response: ClassVar[type[BaseModel]]
    system: ClassVar[str | None] = None
    version = "1"
    paid = True
    needs = ("llm",)

    @dataclass(frozen=True)
    class Config:
        """`model`: the identity of `context.llm`. `response_format`: JSON, as it is sent. None for temperature or
        max_tokens leaves it to the provider."""

        model: str
        response_format: str
        system: str | None = None
        temperature: float | None = None
        max_tokens: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if hasattr(cls, "response"):
            from featurekit_spark.llm.schema import arrow_type

            if not hasattr(cls.response, "model_json_schema"):
                raise DefinitionError(
                    f"{cls.__module__}.{cls.__qualname__}: response must be a pydantic model, found {cls.response!r}"
                )
            cls.key = cls.__dict__.get("key", ("prompt",))
            cls.value = arrow_type(cls.response)
            if cls.key != ("prompt",):
                raise DefinitionError(
                    f"{cls.__module__}.{cls.__qualname__}: a completion's key is ('prompt',), found {cls.key!r}. "
                    "Make a builder of your own key that reads it: deps = (ThisBuilder.on(prompt=YourPrompt),)"
                )
        super().__init_subclass__(**kwargs)

    def default_config(self, context: Any) -> Config:
        from featurekit_spark.llm.schema import strict_schema

        name = re.sub(r"[^A-Za-z0-9_-]", "_", self.response.__name__)[:64]
        form = {"name": name, "schema": strict_schema(self.response), "strict": True}
        merchant = context.merchant_config
        return self.Config(
            context.llm.identity,
            # In the model's order, which is the order in which the answer is made: so it is part of the identity.
            json.dumps({"type": "json_schema", "json_schema": form}, ensure_ascii=False),
            system=self.system,
            temperature=merchant.get("temperature"),
            max_tokens=merchant.get("max_tokens"),
        )

    def pricing(self, config: Config, context: Any) -> Pricing | None:
        """What the model says of its calls before they are made, repairs not counted; the schema is read as well."""
        ask = getattr(context.llm, "expected_cost", None)
        read = f"{config.system or ''}{config.response_format}"
        return None if ask is None else RequestPricing(ask, read, config.max_tokens)

    async def build_one(
        self, inputs: dict[str, Any], config: Config, context: Any
    ) -> Metered[dict[str, Any]]:
        if context.llm.identity != config.model:
            raise ContextError(
                f"{self.name} is configured for {config.model!r}, but context.llm is {context.llm.identity!r}. "
                "Give the context the model you mean; the config follows."
            )
        return await _Asking(self, config, context.llm).answer(inputs["prompt"])


class _Asking:
    """One key's calls: the first, and the repair where it needs one. An error is told what both took, attempts and
    cost, and the text."""

    def __init__(
        self, builder: StructuredCompletion, config: StructuredCompletion.Config, model: ChatModel
    ) -> None:
        self.response, self.kind = builder.response, value_type(builder.value)
        self.config, self.model = config, model
        self.answers: list[Completion] = []

    async def answer(self, prompt: str) -> Metered[dict[str, Any]]:
        try:
            first = await self._ask(prompt)
            value, wrong = self._read(first)
            if wrong is not None:
                said = {"role": "user", "content": prompt}, {"role": "assistant", "content": first.text}
                value, wrong = self._read(await self._ask(self._complaint(wrong), said))
            if wrong is not None:
                raise BuildError(
                    f"two answers did not fit {self.response.__name__}, the second: {wrong}. What the model said is "
                    "kept with the entry."
                )
        except FeaturekitError as error:
            if self.answers:
                cost = self._cost() + (cost_of(error) or NOTHING)
                error.with_cost(cost.tokens, cost.usd, cost.estimated_tokens)
                error.attempts = self._attempts() + (error.attempts or 0)
                error.answer = self.answers[-1].text
            raise
        cost = self._cost()
        return Metered(value, cost.tokens, cost.usd, cost.estimated_tokens, self._attempts())

    async def _ask(self, prompt: str, earlier: Sequence[Message] = ()) -> Completion:
        config = self.config
        answer = await self.model.complete(
            prompt,
            system=config.system,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            response_format=json.loads(config.response_format),
            earlier=earlier,
        )
        self.answers.append(answer)
        return answer

    def _read(self, answer: Completion) -> tuple[Any, str | None]:
        """The value, or what is wrong with the answer. Raises BuildError where asking again would not help."""
        from featurekit_spark.llm.schema import MisfitError, read_answer

        name = self.response.__name__
        try:
            return read_answer(self.response, self.kind, answer.text), None
        except MisfitError as error:
            if answer.finish_reason != "length":
                return None, str(error)
            raise BuildError(
                f"the answer was cut off before it was a whole {name}; give it more than max_tokens = "
                f"{self.config.max_tokens!r}"
            ) from error
        except Exception as error:  # a user's validator may raise anything
            raise BuildError(f"a validator of {name} failed with {type(error).__name__}: {error}") from error

    def _complaint(self, wrong: str) -> str:
        """Names the schema, too: servers that do not know response_format ignore it, and the model never saw it."""
        schema = json.loads(self.config.response_format)["json_schema"]["schema"]
        return (
            f"Your answer does not fit: {wrong}\nAnswer again, with one JSON object and nothing else, by this "
            f"JSON Schema:\n{json.dumps(schema, ensure_ascii=False)}"
        )

    def _cost(self) -> Cost:
        """Of all answers, and of the attempts that led to them."""
        return sum((answer.cost for answer in self.answers), NOTHING)

    def _attempts(self) -> int:
        return sum(answer.attempts for answer in self.answers)
