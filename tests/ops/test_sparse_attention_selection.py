"""What sparse attention keeps, against loops that do what the docstring says."""

from __future__ import annotations

import operator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tests.ops.sparse_attention_cases import CASES, Case, make_inputs, selection_arguments
from torch import Tensor

from sparsepeft.ops import selection_recall, sparse_attention
from sparsepeft.ops.sparse_attention.arguments import Settings, Visibility
from sparsepeft.ops.sparse_attention.cpu import cpu_keep_tokens
from sparsepeft.ops.sparse_attention.selection import keep_blocks, keep_tokens, match_scores, pooled_scores
from sparsepeft.ops.sparse_attention.similarity import Codes, count_matches


class Chosen(NamedTuple):
    """What a selection of single keys is given."""

    query: Tensor
    codes: Codes
    visibility: Visibility
    settings: Settings

    def expected(self) -> Tensor:
        """What plain PyTorch keeps."""
        return keep_tokens(self.codes.scores(self.query, slice(None)), self.visibility, self.settings)


def make_codes(case: Case, num_codewords: int, similarity: str = "inner_product") -> Chosen:
    """Random codes (few codewords: many ties), and the rest of what a selection is given."""
    num_subvectors = case.head_size // case.width
    shapes = (case.batch, case.heads, case.num_queries), (case.batch, case.kv_heads, case.num_keys)
    queries, keys = (torch.randint(num_codewords, (*s, num_subvectors), dtype=torch.uint8) for s in shapes)
    (query, *_), options = make_inputs(case)
    codebooks = options["codebooks"][:, :, :num_codewords]
    arguments = selection_arguments(case, options | {"similarity": similarity})
    return Chosen(query, Codes(keys, None if arguments[1].inner_product else queries, codebooks), *arguments)


def naive_scores(chosen: Chosen) -> list:
    """Similarities as nested lists, (B, H, Tq, Tk); inner products in Python's numbers, which are exact here."""
    codes, (batch, heads, num_queries, _) = chosen.codes, chosen.query.shape
    group, width = heads // codes.keys.shape[1], codes.codebooks.shape[-1]

    def table(query: list[float], books: list) -> list[list[int]]:
        subvectors = [query[i : i + width] for i in range(0, len(query), width)]
        products = [
            [sum(map(operator.mul, sub, word)) for word in words] for sub, words in zip(subvectors, books, strict=True)
        ]
        above = [[p - min(row) for p in row] for row in products]
        largest = max(map(max, above))
        return [[round(float32(float32(255 / largest) * u)) if largest else 0 for u in row] for row in above]

    def row(b: int, h: int, i: int) -> list[int]:
        keys = codes.keys[b, h // group].tolist()
        if codes.queries is not None:
            return [sum(map(operator.eq, key, codes.queries[b, h, i].tolist())) for key in keys]
        entries = table(chosen.query[b, h, i].tolist(), codes.codebooks[h // group].tolist())
        return [sum(entry[c] for entry, c in zip(entries, key, strict=True)) for key in keys]

    return [[[row(b, h, i) for i in range(num_queries)] for h in range(heads)] for b in range(batch)]


def float32(number: float) -> float:
    return float(np.float32(number))


def valid_keys(case: Case, visibility: Visibility, batch: int, query: int) -> list[int]:
    """The definition, from the arguments and not from the limits."""
    position = int(visibility.positions[batch, query])
    return [
        j
        for j in range(case.num_keys)
        if (visibility.key_mask is None or visibility.key_mask[batch, j])
        and (not case.options.get("causal") or j <= position)
        and ("window" not in case.options or j > position - case.options["window"])
    ]


def naive_tokens(case: Case, chosen: Chosen) -> Tensor:
    kept = torch.zeros(case.batch, case.heads, case.num_queries, case.num_keys, dtype=torch.bool)
    visibility, settings, scores = chosen.visibility, chosen.settings, naive_scores(chosen)
    for b in range(case.batch):
        for i in range(case.num_queries):
            valid, position = valid_keys(case, visibility, b, i), int(visibility.positions[b, i])
            for h in range(case.heads):

                def order(j: int, row=scores[b][h][i], valid=valid, position=position) -> tuple:
                    return (
                        not (settings.keep_self and j == position),
                        not (settings.keep_first and j == valid[0]),
                        -row[j],
                        abs(j - position),
                        j,
                    )

                kept[b, h, i, sorted(valid, key=order)[: settings.top_l]] = True
    return kept


@pytest.mark.parametrize("similarity", ["inner_product", "matches"])
@pytest.mark.parametrize("name", CASES)
def test_cpu_and_torch_keep_tokens_as_defined(name: str, similarity: str) -> None:
    case = CASES[name]._replace(batch=min(2, CASES[name].batch))
    for num_codewords in (1, 16) if case.num_keys > 20 else (1, 3, 16):  # with one codeword everything is a tie
        chosen = make_codes(case, num_codewords, similarity)
        expected = naive_tokens(case, chosen)
        assert torch.equal(chosen.expected(), expected)
        assert torch.equal(cpu_keep_tokens(*chosen), expected)


@pytest.mark.parametrize("similarity", ["inner_product", "matches"])
def test_cpu_selection_at_the_edges_of_words(similarity: str) -> None:
    for top_l in (1, 2, 3, 63, 64, 65, 127, 128, 129, 200, 1000):
        for num_keys in (64, 128, 200):
            for options in ({}, {"causal": True}, {"causal": True, "window": 65}):
                case = Case(1, 2, 1, num_keys, num_keys, 8, 8, 2, top_l, "scattered", options)
                chosen = make_codes(case, 2, similarity)
                assert torch.equal(cpu_keep_tokens(*chosen), chosen.expected())


@pytest.mark.parametrize("similarity", ["inner_product", "matches"])
def test_cpu_selection_with_any_number_of_subvectors(similarity: str) -> None:
    for num_subvectors in (*range(1, 34), 250):
        case = Case(1, 2, 1, 80, 80, num_subvectors, 8, 1, 20)
        chosen = make_codes(case, 1 + num_subvectors % 16, similarity)
        assert torch.equal(cpu_keep_tokens(*chosen), chosen.expected())


def test_cpu_sums_do_not_overflow() -> None:
    chosen = make_codes(Case(1, 1, 1, 80, 80, 256, 8, 1, 20), 2)
    chosen.query[:] = 1  # each entry is 0 or 255
    chosen.codes.codebooks[:] = torch.tensor([0.0, 1.0]).view(2, 1)
    chosen.codes.keys[:, :, ::3] = 1
    assert chosen.codes.scores(chosen.query, slice(None)).max() == 255 * 256
    assert torch.equal(cpu_keep_tokens(*chosen), chosen.expected())


def test_count_matches() -> None:
    query_codes, key_codes = (torch.randint(3, (2, heads, n, 5), dtype=torch.uint8) for heads, n in ((4, 6), (2, 7)))
    matches = count_matches(query_codes, key_codes)
    for h in range(4):
        expected = (query_codes[:, h, :, None] == key_codes[:, h // 2, None]).sum(-1)
        assert torch.equal(matches[:, h].long(), expected)


# Blocks


def naive_block_scores(
    case: Case, query_codes: Tensor, key_codes: Tensor, visibility: Visibility, settings: Settings
) -> Tensor:
    """The mean over pairs, pair by pair."""
    size = settings.block_size
    blocks = [range(0, n, size) for n in (case.num_queries, case.num_keys)]
    scores = torch.zeros(case.batch, case.heads, *map(len, blocks))
    matches = count_matches(query_codes, key_codes)
    for b in range(case.batch):
        mask = [True] * case.num_keys if visibility.key_mask is None else visibility.key_mask[b].tolist()
        positions = visibility.positions[b].tolist()
        padding = [settings.keep_self and 0 <= p < case.num_keys and not mask[p] for p in positions]
        for i, query_begin in enumerate(blocks[0]):
            queries = [q for q in range(query_begin, min(query_begin + size, case.num_queries)) if not padding[q]]
            for j, key_begin in enumerate(blocks[1]):
                keys = [k for k in range(key_begin, min(key_begin + size, case.num_keys)) if mask[k]]
                if queries and keys:
                    pairs = matches[b][:, queries][:, :, keys]
                    scores[b, :, i, j] = pairs.sum((1, 2)).float() / (len(queries) * len(keys))
    return scores


def naive_blocks(case: Case, scores: Tensor, visibility: Visibility, settings: Settings) -> Tensor:
    size = settings.block_size
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for b in range(case.batch):
        for i in range(scores.shape[2]):
            queries = range(i * size, min((i + 1) * size, case.num_queries))
            possible = sorted({k // size for q in queries for k in valid_keys(case, visibility, b, q)})
            places = [int(visibility.positions[b, q]) // size for q in queries]
            around = set(possible) & set(range(min(places), max(places) + 1)) if settings.keep_self else set()
            count = max(-(-settings.top_l // size), min(2, len(around)))
            for h, row in enumerate(scores[b, :, i].tolist()):

                def order(j: int, row=row, places=places, around=around, possible=possible) -> tuple:
                    after = j > max(places)
                    distance = j - max(places) if after else max(0, min(places) - j)
                    return j not in around, not (settings.keep_first and j == possible[0]), -row[j], distance, after

                kept[b, h, i, sorted(possible, key=order)[:count]] = True
    return kept


def naive_pooled_scores(case: Case, query: Tensor, key: Tensor, visibility: Visibility, settings: Settings) -> Tensor:
    """Query by query, what each would attend to."""
    size, group = settings.block_size, case.heads // case.kv_heads
    scores = torch.zeros(case.batch, case.heads, -(-case.num_queries // size), -(-case.num_keys // size))
    for b in range(case.batch):
        mask = [True] * case.num_keys if visibility.key_mask is None else visibility.key_mask[b].tolist()
        seen = [{k // size for k in valid_keys(case, visibility, b, q)} for q in range(case.num_queries)]
        positions = visibility.positions[b].tolist()
        means = {
            j: key[b][:, [k for k in range(j * size, min((j + 1) * size, case.num_keys)) if mask[k]]].mean(1)
            for j in set().union(*seen)
        }
        for i in range(scores.shape[2]):
            rows = range(i * size, min((i + 1) * size, case.num_queries))
            possible = set().union(*(seen[q] for q in rows))
            places = [positions[q] // size for q in rows]
            anyway = set(range(min(places), max(places) + 1)) if settings.keep_self else set()
            anyway |= {min(possible)} if possible and settings.keep_first else set()
            for q in rows:
                blocks = sorted(seen[q] - anyway)
                if settings.keep_self and 0 <= positions[q] < case.num_keys and not mask[positions[q]]:
                    continue
                for h in range(case.heads if blocks else 0):
                    products = torch.stack([query[b, h, q] @ means[j][h // group] for j in blocks])
                    scores[b, h, i, blocks] += (products * settings.scale).softmax(0)
    return scores


@pytest.mark.parametrize("name", [name for name in CASES if name != "positions outside"])  # not consecutive
def test_blocks_are_kept_as_defined(name: str) -> None:
    case = CASES[name]
    for block_size, num_codewords in ((7, 16), (16, 1)):
        query, (keys, queries, _), visibility, settings = make_codes(case, num_codewords, "matches")
        settings = settings._replace(block_size=block_size)
        scores = match_scores(queries, keys, visibility, settings)
        # Whole numbers up to the one division: equal to the bit, ties included.
        assert torch.equal(scores, naive_block_scores(case, queries, keys, visibility, settings))
        key = make_inputs(case)[0][1]
        pooled = pooled_scores(query, key, visibility, settings)
        torch.testing.assert_close(pooled, naive_pooled_scores(case, query, key, visibility, settings))
        for each in (scores, pooled):
            lists = keep_blocks(each, case.num_keys, visibility, settings)
            assert torch.equal(lists.to_mask(each.shape[-1]), naive_blocks(case, each, visibility, settings))
            for row, count in zip(lists.indices.flatten(0, 2).tolist(), lists.counts.flatten().tolist(), strict=True):
                assert row[:count] == sorted(set(row[:count]))  # ascending, as the kernels and BlockMask expect


# Recall


def test_recall_of_a_perfect_and_of_a_blind_selection() -> None:
    query, key = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 200, 8)
    blind = torch.zeros(2, 1, 16, 8)  # all codewords equal: every code is 0, the nearest keys are kept
    recall = selection_recall(query, key, blind, top_l=20, keep_self=False, keep_first=False)
    assert 0.05 < recall < 0.15  # by chance one in ten
    assert selection_recall(query, key, blind, top_l=200) == 1.0
    # Keys at the codewords, queries far along one of them: the keys of that codeword score highest.
    words = 10 * torch.eye(8).unsqueeze(0).unsqueeze(0).repeat(2, 1, 1, 1)
    at_words = words[:, 0].repeat(1, 25, 1).unsqueeze(0)
    free = {"keep_self": False, "keep_first": False}
    assert selection_recall(5 * at_words[:, :, :40], at_words, words, top_l=25, **free) == 1.0


def test_recall_counts_pairs_by_hand() -> None:
    case = CASES["grouped heads"]
    (query, key, _), options = make_inputs(case)
    codebooks, top_l = options["codebooks"], case.top_l
    for granularity in ("token", "block"):
        recall = selection_recall(
            query, key, codebooks, top_l=top_l, causal=True, granularity=granularity, block_size=5
        )
        one_hot = torch.eye(case.num_keys).expand(*key.shape[:2], -1, -1)  # attention then shows what is kept
        weights = sparse_attention(
            *(query, key, one_hot, codebooks), top_l=top_l, causal=True, granularity=granularity, block_size=5
        )
        scores = query @ key.repeat_interleave(3, 1).mT
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
        best = scores.topk(top_l, -1).indices[:, :, top_l:]
        assert recall == pytest.approx((weights[:, :, top_l:].gather(-1, best) > 0).float().mean().item())
