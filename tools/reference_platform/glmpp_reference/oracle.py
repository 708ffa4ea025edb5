"""The oracle for the real engine: transformers' `generate` on the same checkpoint, dequantised."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from glmpp.checkpoint import Checkpoint
from glmpp.lab.forward import unsplit_model
from glmpp_reference.served import TOKENS


@dataclass
class Answer:
    """To one prompt: token ids, and for each the log-probabilities of the likeliest tokens."""

    tokens: list[int]
    logprobs: list[dict[int, float]] = field(repr=False)

    def differences(self, other: Answer) -> list[float]:
        """For each token, up to the first that is another: the largest difference of a log-probability that both name."""
        found = []
        for mine, theirs, a, b in zip(self.tokens, other.tokens, self.logprobs, other.logprobs):
            found.append(max(abs(a[token] - b[token]) for token in a.keys() & b.keys()))
            if mine != theirs:
                break
        return found

    def gap(self) -> float:
        """The smallest distance of a chosen token's log-probability from the runner-up's."""
        ranked = (sorted(step.values())[::-1] for step in self.logprobs)
        return min(best - second for best, second, *_ in ranked)


@torch.no_grad()
def oracle(checkpoint: Checkpoint, asked: list[list[int]]) -> list[Answer]:
    """transformers' greedy `generate` on the dequantised checkpoint, in float32, one prompt at a time."""
    model, answers = unsplit_model(checkpoint), []
    for prompt in asked:
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logprobs = [dict(enumerate(logits[0].log_softmax(-1).tolist())) for logits in made.logits]
        answers.append(Answer(made.sequences[0, len(prompt) :].tolist(), logprobs))
    return answers
