"""`hqlt generate`, `hqlt chat`, `hqlt score` and `hqlt convert`, as they are called."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors import SafetensorError

import hqlt.models.tokenizer
import hqlt.score
import hqlt.speak
from hqlt import LanguageModel, MemoryConfig, ModelConfig, load_model, load_state, save_model, save_state
from hqlt.cli import main
from hqlt.models.generation import generate
from hqlt.models.tokenizer import ByteTokenizer, load_tokenizer


def make(folder, vocab_size: int = 256, **memory):
    torch.manual_seed(4)
    shape = MemoryConfig(**{"hidden_size": 16, "num_heads": 2, "window": 5, **memory})
    model = LanguageModel(ModelConfig(vocab_size=vocab_size, memory=shape, initializer_range=0.4)).eval()
    save_model(model, folder)
    return model


def library_tokenizer(folder, size: int):
    """A BPE tokenizer of the library, trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the memory of the past, the memory of the window – über alles"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def expected_text(model, prompt: bytes, count: int) -> str:
    """What a terminal sees: bytes of a character that is not complete yet are not shown."""
    step = ByteTokenizer().stream([])
    return "".join(step(token) for token in generate(model, torch.tensor(list(prompt)), count, temperature=0))


GREEDY = ["--temperature", "0", "--max-new-tokens", "12"]


def test_generate_prints_the_prompt_and_its_continuation(tmp_path, capsys):
    model = make(tmp_path / "m")
    assert main(["generate", "--model", str(tmp_path / "m"), "--prompt", "héllo", *GREEDY, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == "héllo" + expected_text(model, "héllo".encode(), 12) + "\n"
    assert "read 6 tokens" in err
    assert "wrote 12 tokens" in err
    assert "memories after 18 tokens: " in err
    assert "KV memory 1,024 B, FW memory 1,024 B" in err


def test_generate_goes_on_from_saved_memories(tmp_path, capsys):
    model = make(tmp_path / "m")
    options = ["generate", "--model", str(tmp_path / "m"), *GREEDY]
    state = str(tmp_path / "state")
    assert main([*options, "--prompt", "one two", "--save-state", state]) == 0
    capsys.readouterr()
    assert int(load_state(state).position) == len("one two") + 12
    assert main([*options, "--prompt", " three", "--state", state]) == 0
    text = b"one two" + bytes(generate(model, torch.tensor(list(b"one two")), 12, temperature=0)) + b" three"
    assert capsys.readouterr().out == " three" + expected_text(model, text, 12) + "\n"


def test_generate_reads_standard_input(tmp_path, capsys, monkeypatch):
    make(tmp_path / "m")
    options = ["generate", "--model", str(tmp_path / "m"), *GREEDY]
    assert main([*options, "--prompt", "abc"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin.read", lambda: "abc", raising=False)
    monkeypatch.setattr("sys.stdin", type("Input", (), {"read": staticmethod(lambda: "abc")}))
    assert main(options) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "nowhere", "--prompt", "x"], "nowhere holds no config.json"),
        (["generate", "--model", "m", "--prompt", ""], "the prompt is empty, and this model has no token that begins"),
        (["generate", "--model", "m", "--prompt", "x", "--temperature", "-1"], "temperature=-1.0 must be finite"),
        (["generate", "--model", "m", "--prompt", "x", "--top-p", "0"], "top_p=0.0 in (0, 1]"),
        (["generate", "--model", "m", "--prompt", "x", "--state", "none"], "there is no hqlt state at none"),
        (["generate", "--model", "other", "--prompt", "x"], "holds no tokenizer.json, and a vocabulary of 40"),
        (["score", "none.txt", "--model", "m"], "there is no file none.txt"),
        (["score", "one.txt", "--model", "m"], "has fewer than two tokens"),
        (["convert", "m", "other"], "is there already; choose a new folder"),
        (["convert", "nowhere", "new"], "there is no checkpoint at nowhere"),
    ],
)
def test_what_cannot_be_done(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "m")
    make(tmp_path / "other", vocab_size=40)
    (tmp_path / "one.txt").write_text("a")
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert err.startswith("hqlt: ") or "\nhqlt: " in err
    assert message in err
    assert not out
    assert not (tmp_path / "new").exists()


def test_chat(tmp_path, capsys, monkeypatch):
    model = make(tmp_path / "m")
    state = str(tmp_path / "state")
    said = f"ab|cd|/undo|cd|/stats|/save {state}|/reset|ab|/load {state}|ef|/save|/x|"
    lines = iter(said.split("|"))

    def ask(_: str) -> str:
        print("\n@", end="")
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    assert main(["chat", "--model", str(tmp_path / "m"), *GREEDY, "--stop", "never"]) == 0
    out, err = capsys.readouterr()
    answers = [part.rstrip("\n") for part in out.split("\n@")]
    text, shown = b"", []
    for line in (b"ab\n", b"cd\n", b"ef\n"):
        text += line
        shown.append(expected_text(model, text, 12).rstrip("\n"))
        text += bytes(generate(model, torch.tensor(list(text)), 12, temperature=0))
    assert answers[1] == shown[0]
    assert answers[2] == shown[1]
    assert answers[4] == answers[2]
    assert f"memories after {2 * 15} tokens" in answers[5]
    assert answers[8] == answers[1]
    assert answers[10] == shown[2]
    assert "/save needs the name of a file" in err
    assert answers[12].startswith("Type a text")


def said_in_chat(folder, lines, monkeypatch, capsys, *options: str) -> tuple[list[str], str]:
    """What was shown after each line, and the errors. A line that is an exception is raised."""
    rest = iter(lines)

    def ask(_: str) -> str:
        print("\n@", end="")
        line = next(rest, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", ask)
    assert main(["chat", "--model", str(folder), *GREEDY, "--stop", "never", *options]) == 0
    out, err = capsys.readouterr()
    return [part.rstrip("\n") for part in out.split("\n@")], err


def memories(answer: str) -> str:
    return answer.splitlines()[-1]


def test_a_turn_is_taken_back_and_no_more(tmp_path, capsys, monkeypatch):
    model = make(tmp_path / "m")
    save_state(model(torch.zeros(1, 20, dtype=torch.long))[1], tmp_path / "state")
    lines = ["/stats", "/undo", "/stats", "ab", "/undo", "/stats", "/reset", "/undo", "ab", "/undo", "/stats"]
    answers, err = said_in_chat(tmp_path / "m", lines, monkeypatch, capsys, "--state", str(tmp_path / "state"))
    assert all("after 20 tokens" in memories(answers[n]) for n in (1, 3, 6))
    assert err.count("there is no turn to take back") == 2
    assert memories(answers[11]) == "memories: empty"


def test_an_answer_that_fails_is_taken_back(tmp_path, capsys, monkeypatch):
    make(tmp_path / "m")
    say, broken = hqlt.speak._say, []

    def fail(piece: str) -> None:
        if broken:
            raise broken.pop()
        say(piece)

    def ask_and_break(lines):
        for line in lines:
            if line == "cd":
                broken.append(OSError("no paper"))
            yield line

    monkeypatch.setattr(hqlt.speak, "_say", fail)
    answers, err = said_in_chat(
        tmp_path / "m", ask_and_break(["ab", "cd", "/stats", "/undo", "/stats"]), monkeypatch, capsys
    )
    assert "no paper" in err
    assert "after 15 tokens" in memories(answers[3])
    assert memories(answers[5]) == "memories: empty"


def test_interruptions_of_a_chat(tmp_path, capsys, monkeypatch):
    make(tmp_path / "m")
    say, stop = hqlt.speak._say, []

    def interrupted(piece: str) -> None:
        say(piece)
        if stop and stop.pop():
            raise KeyboardInterrupt

    def lines():
        yield KeyboardInterrupt()
        stop.append(True)
        yield "ab"
        yield "/stats"
        yield UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        yield "/undo"
        yield "/stats"

    monkeypatch.setattr(hqlt.speak, "_say", interrupted)
    answers, err = said_in_chat(tmp_path / "m", lines(), monkeypatch, capsys)
    assert "/quit or the end of the input ends the chat" in answers[1]
    assert answers[2].endswith(" …")
    assert re.search(r"after [4-9] tokens", memories(answers[3]))
    assert "that was no text" in err
    assert memories(answers[6]) == "memories: empty"


def test_states_of_several_texts_are_not_continued(tmp_path, capsys):
    model = make(tmp_path / "m")
    save_state(model(torch.zeros(3, 9, dtype=torch.long))[1], tmp_path / "state")
    arguments = ["generate", "--model", str(tmp_path / "m"), "--prompt", "a", "--state", str(tmp_path / "state")]
    assert main(arguments) == 1
    assert "the state is that of 3 texts" in capsys.readouterr().err


def test_memories_of_another_precision(tmp_path, capsys):
    model = make(tmp_path / "m").double()
    save_state(model(torch.zeros(1, 9, dtype=torch.long))[1], tmp_path / "state")
    arguments = ["generate", "--model", str(tmp_path / "m"), "--prompt", "a", "--state", str(tmp_path / "state")]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("a")


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    make(tmp_path / "m")

    def full(*arguments, **options):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    arguments = ["generate", "--model", str(tmp_path / "m"), "--prompt", "a", "--save-state", str(tmp_path / "x" / "s")]
    assert main(arguments) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "new")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "x"]
    assert not list((tmp_path / "x").iterdir())


def test_an_answer_ends_with_the_stop(tmp_path, capsys, monkeypatch):
    model = make(tmp_path / "m")
    free = expected_text(model, b"ab\n", 12)
    stop = next(c for c in free[3:] if c.isascii() and c.isprintable())
    lines = iter(["ab", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["chat", "--model", str(tmp_path / "m"), *GREEDY, "--stop", stop]) == 0
    assert capsys.readouterr().out.endswith("/quit\n" + free[: free.index(stop) + 1] + "\n")


def test_score_is_the_loss_of_the_text(tmp_path, capsys, monkeypatch):
    model = make(tmp_path / "m")
    text = "Zeile für Zeile\n" * 30
    (tmp_path / "text").write_text(text)
    arguments = ["score", str(tmp_path / "text"), "--model", str(tmp_path / "m"), "--chunk-size", "37"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    ids = torch.tensor([list(text.encode())])
    bits = model.loss(ids)[0].item() / math.log(2)
    per_byte = bits * (ids.numel() - 1) / ids.numel()
    assert out.startswith(f"{bits:.4f} bits per token, {per_byte:.4f} bits per byte over ")

    # Interrupted in the middle, then run again.
    stream, calls = hqlt.LanguageModel.stream, []

    def interrupted(self, *given, **options):
        for score in stream(self, *given, **options):
            calls.append(score.read)
            if len(calls) == 5:
                raise KeyboardInterrupt
            yield score

    progress = ["--progress", str(tmp_path / "progress")]
    monkeypatch.setattr(hqlt.LanguageModel, "stream", interrupted)
    monkeypatch.setattr(hqlt.models.tokenizer, "BLOCK", 50)
    assert main([*arguments, *progress]) == 130
    assert main([*arguments, *progress]) == 0
    assert calls[:7] == [37, 74, 111, 148, 185, 185, 222]
    assert capsys.readouterr().out.split(" (")[0] == out.split(" (")[0]
    (tmp_path / "text").write_text("ab")
    assert main([*arguments, *progress]) == 1
    assert "belongs to another text than" in capsys.readouterr().err
    (tmp_path / "text").write_text("Zeile fur Zeile\n" * 40)
    assert main([*arguments, *progress]) == 1
    assert "belongs to another text than" in capsys.readouterr().err
    torch.manual_seed(9)
    other = LanguageModel(model.config)
    save_model(other, tmp_path / "m")
    (tmp_path / "text").write_text(text)
    assert main([*arguments, *progress]) == 1
    assert "belongs to another model" in capsys.readouterr().err


def test_work_on_a_score_is_kept_while_it_goes_on(tmp_path, monkeypatch):
    make(tmp_path / "m")
    (tmp_path / "text").write_bytes(b"\xff\r\n\x00" * 100)
    monkeypatch.setattr(hqlt.score, "SAVE_SECONDS", -1.0)
    stream, seen = hqlt.LanguageModel.stream, []

    def watched(self, *given, **options):
        for score in stream(self, *given, **options):
            if (tmp_path / "progress").exists():
                seen.append(hqlt.StreamScore.load(tmp_path / "progress", self).read)
            yield score

    monkeypatch.setattr(hqlt.LanguageModel, "stream", watched)
    arguments = ["score", str(tmp_path / "text"), "--model", str(tmp_path / "m"), "--chunk-size", "100"]
    assert main([*arguments, "--progress", str(tmp_path / "progress")]) == 0
    assert seen == [100, 200, 300]


def test_a_long_line_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(hqlt.models.tokenizer, "BLOCK", 10)
    make(tmp_path, vocab_size=300)
    tokenizer = library_tokenizer(tmp_path, 300) and load_tokenizer(tmp_path, 300)
    (tmp_path / "text").write_text("the memory of the past" * 5 + "\nwindow\n")
    for kind in (tokenizer, ByteTokenizer()):
        pieces = list(kind.read(tmp_path / "text"))
        assert len(pieces) > 5
        assert max(map(len, pieces)) <= 20
        step = kind.stream([])
        assert "".join(step(n) for piece in pieces for n in piece) == (tmp_path / "text").read_text()


def test_convert_there_and_back(tmp_path, capsys):
    model = make(tmp_path / "m")
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "published")]) == 0
    assert json.loads((tmp_path / "published" / "config.json").read_text())["model_type"] == "hybrid_qlt"
    assert main(["convert", str(tmp_path / "published"), str(tmp_path / "again")]) == 0
    again = load_model(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert "published format of hybrid_qlt" in capsys.readouterr().out


def test_a_tokenizer_beside_the_model(tmp_path, capsys):
    make(tmp_path / "m", vocab_size=300)
    library = library_tokenizer(tmp_path / "m", 300)
    tokenizer = load_tokenizer(tmp_path / "m", 300)
    text = "the memory – über 語 the past"
    ids = tokenizer.encode(text)
    assert ids == library.encode(text).ids
    step = tokenizer.stream([])
    pieces = [step(token) for token in ids]
    assert "".join(pieces) == text
    assert "" in pieces
    assert tokenizer.start == []
    assert "\ufffd" in "".join(map(tokenizer.stream([]), tokenizer.encode("a\udcffb")))
    assert main(["generate", "--model", str(tmp_path / "m"), "--prompt", "the memory", *GREEDY]) == 0
    assert capsys.readouterr().out.startswith("the memory")
    with pytest.raises(ValueError, match=r"tokenizer\.json has \d+ ids but the model 256"):
        load_tokenizer(tmp_path / "m", 256)
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        load_tokenizer(tmp_path / "m", 300)


def test_a_tokenizer_with_borders_and_spaces_of_words(tmp_path, capsys):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = {"<s>": 0, "</s>": 1, "▁the": 2, "▁memory": 3, "▁of": 4, "?": 5}
    library = Tokenizer(models.WordLevel(words, unk_token="?"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )  # fmt: skip
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, 6)
    assert tokenizer.start == [0]
    assert tokenizer.encode("the memory") == [2, 3]
    assert "".join(map(tokenizer.stream([2, 3]), [4, 2])) == " of the"
    model = make(tmp_path, vocab_size=6)
    state = str(tmp_path / "state")
    options = ["generate", "--model", str(tmp_path), "--prompt", "", "--seed", "3"]
    assert main([*options, "--save-state", state]) == 0
    written = generate(model, torch.tensor([0]), 200, temperature=0.8, top_p=0.95, seed=3)
    assert capsys.readouterr().out == "".join(map(tokenizer.stream([0]), written)) + "\n"
    assert main([*options, "--state", state]) == 1
    assert "the prompt is empty; pass some text" in capsys.readouterr().err


def test_bytes_become_text_when_they_are_complete():
    step = ByteTokenizer().stream([])
    ids = ByteTokenizer().encode("aü語\udcff")
    assert ids == [*"aü語".encode(), 255]
    assert [step(n) for n in ids] == ["a", "", "ü", "", "", "語", "�"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_step_says_the_same(tmp_path, capsys):
    make(tmp_path / "m")
    options = ["generate", "--model", str(tmp_path / "m"), "--prompt", "abc", *GREEDY]
    assert main(options) == 0
    expected = capsys.readouterr().out
    assert main([*options, "--compile"]) == 0
    out, err = capsys.readouterr()
    assert out == expected
    assert err.startswith("compiling the step … ")
