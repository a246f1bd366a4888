"""The truncated rollout once more, in plain Python: the whole text goes through the model at every token.

Written from the method's table of phases, not from the engine: text instead of token tables, lists instead
of lanes, `forward` instead of a cache.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from step_grpo.model import qwen
from step_grpo.reward.steps import trigger_pattern
from step_grpo.rollout.sampling import sample, sample_key


def as_bytes(text):
    """A string with one character for each byte of the text."""
    return text.encode().decode("latin-1")


class BruteForce:
    """One model and one set of settings; call it once a completion."""

    def __init__(self, params, cfg, machine, texts, triggers, longest):
        self.machine, self.texts = machine, texts
        self.pattern = trigger_pattern(tuple(map(as_bytes, triggers)))
        self.longest = longest

        @jax.jit
        def last_logits(tokens, length):
            positions = jnp.arange(longest)[None]
            segments = (positions < length).astype(jnp.int32)
            hidden = qwen.forward(params, cfg, tokens, positions, segments, jnp.float32)
            return qwen.unembed(params, hidden[:, length - 1])

        @jax.jit
        def draw(logits, run_key, prompt_id, sample_id, position):
            keys = sample_key(run_key, prompt_id, sample_id, position)[None]
            return sample(logits, keys, temperature=machine.temperature, top_p=machine.top_p)[0]

        self.last_logits, self.draw = last_logits, draw

    def logits(self, tokens):
        padded = np.zeros((1, self.longest), np.int32)
        padded[0, : len(tokens)] = tokens
        return self.last_logits(padded, len(tokens))

    def text(self, tokens):
        return b"".join(self.texts[t] for t in tokens).decode("utf-8", "replace")

    def confirmed(self, tokens, sampled):
        """The triggers that the sampled token shows to stand: spans in bytes of the text, it included.

        A trigger stands once the byte behind it is there and is no letter.
        """
        before, text = (b"".join(self.texts[t] for t in ids) for ids in (tokens, [*tokens, sampled]))
        spans = [m.span() for m in self.pattern.finditer(text.decode("latin-1"))]
        return [(begin, end) for begin, end in spans if len(before) <= end < len(text)]

    def token_of(self, tokens, byte):
        """The index of the token that holds a byte of the text."""
        ends = np.cumsum([len(self.texts[t]) for t in tokens])
        return int(np.searchsorted(ends, byte, side="right"))

    def __call__(self, prompt, run_key, prompt_id, sample_id):
        m = self.machine
        out, logprobs, forced = [], [], []
        confidences, reason, phase = [], "unfinished", "THINK"
        probes = repetitions = 0
        chunk_start, previous_words, known = 0, None, set()

        def record(token, logits, by_machine):
            scaled = np.asarray(logits, np.float64)[0] / (m.temperature or 1)
            top = scaled.max()
            logprobs.append(scaled[token] - top - math.log(np.exp(scaled - top).sum()))
            out.append(token)
            forced.append(by_machine)

        def close():
            for token in m.closing:
                if len(out) < m.max_response:
                    record(token, self.logits([*prompt, *out]), True)

        while len(out) < m.max_response and phase != "DONE":
            logits = self.logits([*prompt, *out])
            token = int(self.draw(logits, run_key, prompt_id, sample_id, len(out)))
            if phase == "ANSWER":
                record(token, logits, False)
                phase = "DONE" if token in m.eos else phase
                continue
            spans = self.confirmed(out, token) if m.truncate else []
            spans = [(begin, end) for begin, end in spans if begin not in known]
            known |= {begin for begin, _ in spans}  # at most one probe for all of them
            if spans:
                begin, end = spans[0]
                cut = self.token_of([*out, token], begin)
                words = set(self.text(out[chunk_start:cut]).split(" "))
                repetitions += words == previous_words
                previous_words = words
                confidence = 0.0
                if repetitions >= m.max_repetitions:
                    reason = "rep"
                elif probes < m.max_probes:
                    probes += 1
                    confidence = self.confidence([*prompt, *out[:cut]])
                    confidences.append(confidence)
                    if cut >= m.think_budget - m.budget_margin:
                        reason = "budget"
                    if confidence > m.delta:
                        reason = "early_exit"
                if reason != "unfinished":
                    for recorded in (out, logprobs, forced):
                        del recorded[cut:]
                    phase = "ANSWER"
                    close()
                    continue
                chunk_start = self.token_of([*out, token], end - 1) + 1
            record(token, logits, False)
            if token in m.eos:
                reason, phase = "eos", "DONE"
            elif token == m.think_end:
                reason, phase = "natural", "ANSWER"
            elif m.truncate and len(out) >= m.think_budget:
                reason, phase = "budget", "ANSWER"
                close()
        if reason == "unfinished":
            reason = "length"
        return out, logprobs, forced, reason, confidences

    def confidence(self, text):
        m = self.machine
        answer, probs = [], []
        while len(answer) < m.max_probe_tokens:
            logits = np.asarray(self.logits([*text, *m.inducing, *answer]), np.float64)[0]
            p = np.exp(logits - logits.max())
            answer.append(int(logits.argmax()))
            probs.append(p.max() / p.sum())
            if answer[-1] == m.think_end or answer[-1] in m.eos:
                break
        if len(answer) < 2 or (m.strict and answer[-1] != m.think_end):
            return 0.0
        return math.exp(np.mean([math.log(max(p, 1e-10)) for p in probs[1:]]))
