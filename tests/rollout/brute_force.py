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
from step_grpo.rollout.policies import Confidence, Sufficiency, Verifier
from step_grpo.rollout.sampling import sample, sample_key


def as_bytes(text):
    """A string with one character for each byte of the text."""
    return text.encode().decode("latin-1")


def last_logits(params, cfg, longest):
    """Logits behind a whole text, from a full forward pass."""

    @jax.jit
    def run(tokens, length):
        positions = jnp.arange(longest)[None]
        segments = (positions < length).astype(jnp.int32)
        hidden = qwen.forward(params, cfg, tokens, positions, segments, jnp.float32)
        return qwen.unembed(params, hidden[:, length - 1])

    return run


class BruteForce:
    """One model and one set of settings; call it once a completion."""

    def __init__(self, params, cfg, machine, texts, triggers, longest, judge=None, delimiters=()):
        self.machine, self.texts = machine, texts
        self.pattern = trigger_pattern(tuple(map(as_bytes, triggers)))
        self.delimiters = tuple(word.encode() for word in delimiters)
        self.longest = longest
        self.last_logits = last_logits(params, cfg, longest)
        if isinstance(machine.policy, Verifier):
            self.judge_logits = last_logits(judge, machine.policy.judge.config, longest)

        @jax.jit
        def draw(logits, run_key, prompt_id, sample_id, position, drawn):
            keys = sample_key(run_key, prompt_id, sample_id, position, drawn)[None]
            return sample(
                logits,
                keys,
                temperature=machine.temperature,
                top_k=machine.top_k,
                top_p=machine.top_p,
                min_p=machine.min_p,
            )[0]

        self.draw = draw

    def logits(self, tokens, model=None):
        padded = np.zeros((1, self.longest), np.int32)
        padded[0, : len(tokens)] = tokens
        return (model or self.last_logits)(padded, len(tokens))

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

    def completes_delimiter(self, before, token):
        """Whether a delimiter ends in the token; each byte belongs to one delimiter at most."""
        text, ends, start = b"".join(self.texts[t] for t in [*before, token]), [], 0
        for end in range(1, len(text) + 1):
            if any(text[start:end].endswith(word) for word in self.delimiters):
                ends.append(end)
                start = end
        return bool(ends) and ends[-1] > len(text) - len(self.texts[token])

    def __call__(self, prompt, run_key, prompt_id, sample_id, limit=None):
        m = self.machine
        limit = limit or m.max_response
        drawn = 0  # positions below this one had a token that an exit discarded
        out, logprobs, forced = [], [], []
        scores, checked, reason, phase = [], [], "unfinished", "THINK"
        repetitions, chunk_start, previous_words, known = 0, 0, None, set()

        def record(token, logits, by_machine):
            scaled = np.asarray(logits, np.float64)[0] / (m.temperature or 1)
            top = scaled.max()
            logprobs.append(scaled[token] - top - math.log(np.exp(scaled - top).sum()))
            out.append(token)
            forced.append(by_machine)

        def close():
            for token in m.closing:
                if len(out) < limit:
                    record(token, self.logits([*prompt, *out]), True)

        def check(text, length):
            """Asks, while checks are left, whether the thinking ends behind `length` tokens, and why."""
            if len(scores) == m.max_probes:
                return "unfinished"
            score, passes = self.ask([*prompt, *text])
            scores.append(score)
            checked.append(length)
            near = length >= m.think_budget - m.budget_margin
            return "early_exit" if passes else "budget" if near else "unfinished"

        while len(out) < limit and phase != "DONE":
            logits = self.logits([*prompt, *out])
            token = int(self.draw(logits, run_key, prompt_id, sample_id, len(out), drawn))
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
                if repetitions >= m.max_repetitions:
                    reason = "rep"
                elif self.asks_at_trigger(cut, checked):
                    reason = check(out[:cut], cut)
                if reason != "unfinished":
                    drawn = len(out) + 1
                    for recorded in (out, logprobs, forced):
                        del recorded[cut:]
                    phase = "ANSWER"
                    close()
                    continue
                chunk_start = self.token_of([*out, token], end - 1) + 1
            if isinstance(m.policy, Verifier) and self.completes_delimiter(out, token):
                reason = check([*out, token], len(out))
            record(token, logits, False)
            if reason == "unfinished":
                reason = self.ends(token, len(out))
            if reason != "unfinished":
                phase = "DONE" if reason == "eos" else "ANSWER"
            if reason in ("budget", "early_exit"):
                close()
        if reason == "unfinished":
            reason = "length"
        return out, logprobs, forced, reason, scores

    def ends(self, token, length):
        """Why the thinking ends with a recorded token, if it does."""
        m = self.machine
        if token in m.eos:
            return "eos"
        if token == m.think_end:
            return "natural"
        return "budget" if m.truncate and length >= m.think_budget else "unfinished"

    def asks_at_trigger(self, position, checked):
        policy = self.machine.policy
        if isinstance(policy, Sufficiency):
            return not checked or position - checked[-1] >= policy.min_gap
        return isinstance(policy, Confidence)

    def ask(self, text):
        """The score of a check, and whether it passes."""
        policy = self.machine.policy
        if isinstance(policy, Confidence):
            score = self.confidence(text)
            return score, score > policy.delta
        if isinstance(policy, Sufficiency):
            score = math.floor(100 * self.share_of_yes(text, self.last_logits) + 0.5)
            return score / 100, score >= policy.threshold
        score = self.share_of_yes([*policy.judge.prefix, *text], self.judge_logits)
        return score, score > policy.threshold

    def share_of_yes(self, text, model):
        policy = self.machine.policy
        logits = np.asarray(self.logits([*text, *policy.question], model), np.float64)[0]
        p = np.exp(logits - logits.max())
        yes, no = p[list(policy.yes)].sum(), p[list(policy.no)].sum()
        return yes / (yes + no)

    def confidence(self, text):
        m, policy = self.machine, self.machine.policy
        answer, probs = [], []
        while len(answer) < policy.max_notes:
            logits = np.asarray(self.logits([*text, *policy.question, *answer]), np.float64)[0]
            p = np.exp(logits - logits.max())
            answer.append(int(logits.argmax()))
            probs.append(p.max() / p.sum())
            if answer[-1] == m.think_end or answer[-1] in m.eos:
                break
        if len(answer) < 2 or (policy.strict and answer[-1] != m.think_end):
            return 0.0
        return math.exp(np.mean([math.log(max(p, 1e-10)) for p in probs[1:]]))
