"""Log-likelihoods and zero-shot scores: one item at a time without padding, by hand, and in batches of any size."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from adasplash_kernels.integrations.transformers import EntmaxAttentionConfig, use_entmax
from tasks.data import bpe
from tasks.data.items import Choice, LastWord
from tasks.data.tokenizer import Tokenizer
from tasks.errors import DataError
from tasks.models import likelihood
from tasks.models.likelihood import encode_pairs, log_likelihoods
from tasks.models.zero_shot import choose_endings, guess_last_words

TEXT = ["the river wears down the stone", "wind and water, slowly", "under the bright stone"]
POSITIONS = 12


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    raw = bpe.train(TEXT * 20, 300)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>"), "tiny", "0")


@pytest.fixture
def make_model():
    def make(entmax: bool = True, positions: int = POSITIONS, vocab_size: int = 300) -> GPT2LMHeadModel:
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=vocab_size, n_positions=positions, n_layer=2, n_head=2, n_embd=16,
                            attn_pdrop=0.0, initializer_range=0.4, bos_token_id=0, eos_token_id=0)  # fmt: skip
        config._attn_implementation = "sdpa"
        model = GPT2LMHeadModel(config).eval()
        return use_entmax(model, EntmaxAttentionConfig(1.5)) if entmax else model

    return make


def brute_force(model: nn.Module, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """A token at a time, each after all that precedes it, or the last of it that the model has positions for."""
    total, greedy, before = 0.0, True, list(context)
    for token in continuation:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([before[-POSITIONS:]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
        before.append(token)
    return total, greedy


def random_pairs(count: int, longest: int) -> list[tuple[list[int], list[int]]]:
    draw = torch.Generator().manual_seed(1)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(0, 300, (int(torch.randint(low, high, (), generator=draw)),), generator=draw).tolist()

    return [(ids(1, longest), ids(1, 5)) for _ in range(count)]


@pytest.mark.parametrize("entmax", [False, True])
def test_one_at_a_time_without_padding(make_model, entmax):
    model = make_model(entmax)
    pairs = random_pairs(9, POSITIONS - 4)
    with torch.no_grad():  # a continuation that greedy decoding yields
        best = model.generate(torch.tensor([pairs[0][0]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    pairs[0] = (pairs[0][0], best[0, len(pairs[0][0]):].tolist())
    found = log_likelihoods(model, pairs, batch_tokens=40)
    for pair, one in zip(pairs, found, strict=True):
        expected, greedy = brute_force(model, *pair)
        assert one.log == pytest.approx(expected, abs=1e-4)
        assert one.greedy == greedy
    assert found[0].greedy and not all(one.greedy for one in found)


def test_batch_size_does_not_matter(make_model):
    model, pairs = make_model(), random_pairs(12, 20)
    one, some, all_at_once = (log_likelihoods(model, pairs, batch_tokens=n) for n in (1, 60, 10_000))
    for a, b, c in zip(one, some, all_at_once, strict=True):
        assert a.log == pytest.approx(b.log, abs=1e-4) == pytest.approx(c.log, abs=1e-4)
        assert a.greedy == b.greedy == c.greedy


def test_batches_are_bounded_and_complete():
    windows = [likelihood._Window(i, list(range(length)), 1) for i, length in enumerate([3, 9, 5, 9, 2, 7])]
    batches = list(likelihood._batches(windows, 16))
    assert [[w.pair for w in batch] for batch in batches] == [[1, 3], [5, 2], [0, 4]]  # (9-1)*2, (7-1)*2, (3-1)*2


def test_long_contexts_are_cut_from_the_left(make_model):
    model = make_model()
    (context, _), continuation = random_pairs(1, 2)[0], [5, 6, 7]
    long = [9] * 40 + list(range(20, 40))
    [found] = log_likelihoods(model, [(long, continuation)])
    kept = (long + continuation)[-(POSITIONS + 1):]  # one more than the positions: the last token is only predicted
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([kept[:-1]])).logits.double().log_softmax(-1)[0]
    expected = sum(float(logs[len(kept) - 4 + i, token]) for i, token in enumerate(continuation))
    assert found.log == pytest.approx(expected, abs=1e-4)
    assert context


def test_long_continuations_are_scored_in_pieces(make_model):
    """Half of the positions at a time, each piece after what precedes it: no token is left out or counted twice."""
    model = make_model()
    context, continuation = [3, 4, 5], list(range(40, 40 + 2 * POSITIONS + 3))
    [found] = log_likelihoods(model, [(context, continuation)])
    expected, before, size = 0.0, list(context), POSITIONS // 2
    for start in range(0, len(continuation), size):
        piece = continuation[start:start + size]
        [part] = log_likelihoods(model, [(before, piece)])
        expected += part.log
        before += piece
    assert found.log == pytest.approx(expected, abs=1e-4)
    assert [w.scored for w in likelihood._windows(0, (context, continuation), POSITIONS)] == [6, 6, 6, 6, 3]


class Bigram(nn.Module):
    """A model with known likelihoods: the next token depends on the present one alone."""

    def __init__(self, probabilities: torch.Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(*probabilities.shape, bias=False)
        self.head.weight.data = probabilities.log().T.contiguous()
        self.config = SimpleNamespace(max_position_embeddings=50)
        self.device = torch.device("cpu")

    def base_model(self, input_ids, use_cache):
        return SimpleNamespace(last_hidden_state=nn.functional.one_hot(input_ids, self.head.in_features).float())

    def get_output_embeddings(self):
        return self.head


def test_known_likelihoods():
    table = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.25, 0.5, 0.25]])
    pairs = [([0], [1]), ([2, 0], [0, 0, 2]), ([1], [2, 1, 2]), ([0], [0])]
    found = log_likelihoods(Bigram(table), pairs)
    expected = [0.3, 0.5 * 0.5 * 0.2, 0.8 * 0.5 * 0.8, 0.5]
    assert [math.exp(one.log) for one in found] == pytest.approx(expected, rel=1e-5)
    assert [one.greedy for one in found] == [False, False, True, True]


def test_greedy_is_of_all_pieces():
    """After 0 comes 1, after 1 comes 2, after 2 comes 0: greedy only if the first piece is, too."""
    model = Bigram(torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.8, 0.1, 0.1]]))
    model.config.max_position_embeddings = 4
    whole, broken = log_likelihoods(model, [([0], [1, 2, 0, 1, 2]), ([1], [1, 2, 0, 1, 2])])
    assert (whole.greedy, broken.greedy) == (True, False)
    assert math.exp(whole.log) == pytest.approx(0.8**5, rel=1e-5)
    assert math.exp(broken.log) == pytest.approx(0.1 * 0.8**4, rel=1e-5)


def letters(text: str) -> list[int]:
    return [" abé".index(letter) for letter in text]


@pytest.fixture
def by_letter(monkeypatch):
    """Items over the letters a, b, é and the space, a token each."""
    monkeypatch.setattr("tasks.models.zero_shot.encode_pairs", lambda _, texts: [tuple(map(letters, x)) for x in texts])
    # after anything: space 0.4, a 0.3, b 0.2, é 0.1
    return Bigram(torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 4))


def test_endings_are_normalised_by_characters(by_letter):
    """By hand: of " a" (0.12, ln -2.120), " bb" (0.016, -4.135) and " aaa" (0.0108, -4.528) the first is likeliest,
    but a character of the last costs least: -2.120, -2.068, -1.509. A byte of "é" would cost half as much as it does:
    ln(0.04) = -3.219 over 1 character loses against "bb", over 2 bytes it would win."""
    three = ("a", "bb", "aaa")
    score = choose_endings(by_letter, None, [Choice("a", three, 2), Choice("a", three, 0), Choice("a", three, 1)])
    assert (score.accuracy_norm, score.accuracy, score.items) == (1 / 3, 1 / 3, 3)
    [last, first] = (choose_endings(by_letter, None, [Choice("a", three, label)]) for label in (2, 0))
    assert (last.accuracy_norm, last.accuracy) == (1.0, 0.0)
    assert (first.accuracy_norm, first.accuracy) == (0.0, 1.0)
    assert choose_endings(by_letter, None, [Choice("a", ("é", "bb"), 1)]).accuracy_norm == 1.0


def test_the_first_of_equal_endings_is_chosen(by_letter):
    items = [Choice("b", ("a", "a"), 0), Choice("b", ("b", "b"), 1)]
    score = choose_endings(by_letter, None, items)
    assert (score.accuracy_norm, score.accuracy) == (0.5, 0.5)


def test_last_words_by_hand(monkeypatch):
    table = torch.tensor([[0.01, 0.6, 0.29, 0.1], [0.7, 0.1, 0.1, 0.1], [0.2, 0.2, 0.5, 0.1], [0.25, 0.25, 0.25, 0.25]])
    monkeypatch.setattr("tasks.models.zero_shot.encode_pairs", lambda _, texts: [tuple(map(letters, x)) for x in texts])
    items = [LastWord("a", " a"), LastWord("a", " b"), LastWord("b", " a")]  # the last is not greedy: b follows b
    score = guess_last_words(Bigram(table), None, items)
    probabilities = [0.7 * 0.6, 0.7 * 0.29, 0.2 * 0.6]
    assert score.accuracy == pytest.approx(1 / 3)
    assert score.perplexity == pytest.approx(math.prod(probabilities) ** (-1 / 3), rel=1e-5)
    assert score.items == 3


def test_pairs_are_encoded_together(tokenizer):
    def ids(text: str) -> list[int]:
        return tokenizer.backend(text, add_special_tokens=False)["input_ids"]

    first, spaced, alone, spaces, again = encode_pairs(tokenizer, [
        ("the river", " wears down"), ("the river ", "wears down"), ("", " stone"), ("  ", "stone"),
        ("the river", " a stone"),
    ])  # fmt: skip
    context, continuation = first
    assert context + continuation == ids("the river wears down")
    assert context == ids("the river") == again[0]
    assert spaced == first  # the space goes over
    assert alone == ([tokenizer.backend.eos_token_id], ids(" stone"))
    assert spaces == ([tokenizer.backend.eos_token_id], ids("  stone"))
    assert again[0] + again[1] == ids("the river a stone")
    assert encode_pairs(tokenizer, []) == []
    with pytest.raises(DataError, match="^tokenizer: tiny leaves no token for ''"):
        encode_pairs(tokenizer, [("a", "stone"), ("the river", "")])


def test_scores_of_a_real_tokenizer_by_brute_force(make_model, tokenizer):
    model = make_model(vocab_size=320)
    items = [Choice("the river wears", ("down", "the stone", "and water, slowly"), i) for i in range(3)]
    items.append(Choice("under the bright stone " * 4, ("wind", "the", "river"), 0))
    right = right_norm = 0
    for item in items:
        pairs = encode_pairs(tokenizer, [(item.context, " " + ending) for ending in item.endings])
        logs = [brute_force(model, (a + b)[-(POSITIONS + 1):][: -len(b)], b)[0] for a, b in pairs]
        right += max(range(3), key=lambda i: logs[i]) == item.label
        right_norm += max(range(3), key=lambda i: logs[i] / len(item.endings[i])) == item.label
    for batch_tokens in (1, 50, 1000):
        score = choose_endings(model, tokenizer, items, batch_tokens)
        assert (score.accuracy_norm, score.accuracy) == (right_norm / 4, right / 4)
