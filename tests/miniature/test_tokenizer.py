from pathlib import Path

import pytest

from tokenflow.miniature.scenes import VOCABULARY, Attributes
from tokenflow.miniature.tokenizer import MAX_LENGTH, byte_pairs, save_tokenizer


def test_every_word_of_the_grammar_is_one_token(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    seen = set()
    for word in ("a", "on", *(w for words in VOCABULARY.values() for w in words)):
        start, token, end = tokenizer(word)["input_ids"]
        assert (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        seen.add(token)
    assert len(seen) == 2 + sum(map(len, VOCABULARY.values()))


def test_captions_fit_and_are_padded(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    tokens = tokenizer([str(a) for a in Attributes.every()], padding="max_length")["input_ids"]
    assert {len(row) for row in tokens} == {MAX_LENGTH}
    assert tokens[0][8:] == [tokenizer.eos_token_id] * 8


def test_building_twice_in_one_folder_gives_the_same(tmp_path: Path) -> None:
    first = save_tokenizer(tmp_path).get_vocab()
    assert save_tokenizer(tmp_path).get_vocab() == first


@pytest.mark.parametrize(
    ("merges", "expected"),
    [
        ([], ["a", "b", "a", "b</w>"]),
        ([("a", "b")], ["ab", "a", "b</w>"]),
        ([("a", "b</w>"), ("b", "ab</w>")], ["a", "bab</w>"]),
    ],
)
def test_byte_pairs_take_the_earliest_merge_first(
    merges: list[tuple[str, str]], expected: list[str]
) -> None:
    assert byte_pairs("abab", merges) == expected
