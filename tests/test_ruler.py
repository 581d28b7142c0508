"""RULER's tasks: solved from the prompt alone, their lengths, their draws, and every error."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_refine.config import ConfigError
from megatron_refine.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_refine.eval import tasks
from megatron_refine.eval.ruler import MAX_NEW_TOKENS, NIAH, generate, haystack_of, niah
from megatron_refine.eval.ruler.fit import largest_size
from megatron_refine.eval.ruler.haystack import NOISE, read_prose
from megatron_refine.eval.ruler.sample import Case
from megatron_refine.eval.ruler.words import ADJECTIVES, NOUNS, VERBS

GENERATED = [task for task in MAX_NEW_TOKENS if not task.startswith("qa_")]


def count_words(text: str) -> int:
    """A stand-in for a tokenizer: BOS, words of up to four characters, and marks."""
    return 1 + len(re.findall(r"\w{1,4}|[^\w\s]", text))


@pytest.fixture(scope="session")
def count_bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_tokenizer([" ".join(read_prose("").sentences[:400]), NOISE, " ".join(NOUNS)], 1200, path)
    tokenizer = load_tokenizer(path, 1200, "test")
    return lambda text: 1 + len(tokenizer.encode([text])[0])


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """squad.json: 4 articles of 12 paragraphs with an answerable and an impossible question each; hotpotqa.json."""
    folder = tmp_path_factory.mktemp("qa")

    def paragraph(article: int, i: int) -> dict:
        text = f"Paragraph {i} of article {article} says that its number is {article}{i:02}. " * 4
        answers = [{"text": f"{article}{i:02}"}, {"text": f"number {article}{i:02}"}, {"text": f"{article}{i:02}"}]
        asked = {"question": f"Which is {article}-{i}?", "answers": answers, "is_impossible": False}
        return {"context": text, "qas": [asked, {"question": "None?", "answers": [], "is_impossible": True}]}

    squad = {"data": [{"paragraphs": [paragraph(a, i) for i in range(12)]} for a in range(4)]}
    hotpot = [
        {
            "question": f"Who is {i}?",
            "answer": f"Person {i}",
            "context": [[f"Title {i}.{j}", [f"Sentence {j} of {i}. ", f"Person {i} again."]] for j in range(10)],
        }
        for i in range(30)
    ]
    (folder / "squad.json").write_text(json.dumps(squad), encoding="utf-8")
    (folder / "hotpotqa.json").write_text(json.dumps(hotpot), encoding="utf-8")
    return str(folder)


def make(task: str, length: int, indices=range(6), seed: int = 1, count=count_words, **texts) -> list:
    return list(generate(task, length, indices, seed, count, **texts))


# Solved from the prompt alone
def solve_niah(prompt: str) -> list[str]:
    text, question = prompt.rsplit("\nWhat ", 1)
    keys = re.search(r"special magic \w+ for (.*) mentioned in the provided text\?", question)[1]
    hidden = re.findall(r"One of the special magic \w+s for (\S+) is: (\S+)\.", text)
    return [value for key in re.split(r", and |, ", keys) for k, value in hidden if k == key]


def solve_vt(prompt: str) -> list[str]:
    text, question = prompt.split("\n\n")[-1].rsplit("\nQuestion: ", 1)
    held = {re.search(r"assigned the value (\d+) in", question)[1]}
    found = []
    for name, source in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+) ?$", text, re.MULTILINE):
        if source in held:
            held.add(name)
            found.append(name)
    return found


def solve_cwe(prompt: str) -> list[str]:
    listed = re.findall(r"\d+\. (\S+)", prompt.rsplit("Below is", 1)[1])
    return [word for word, _ in Counter(listed).most_common(10)]


def solve_fwe(prompt: str) -> list[str]:
    text = prompt.split("coded words. ", 1)[1].rsplit("\nQuestion", 1)[0]
    return [word for word, _ in Counter(text.split()).most_common() if word != "..."][:3]


SOLVERS = dict.fromkeys(NIAH, solve_niah) | {"vt": solve_vt, "cwe": solve_cwe, "fwe": solve_fwe}


@pytest.mark.parametrize("length", [2000, 4096])
@pytest.mark.parametrize("task", GENERATED)
def test_prompts_hold_what_they_ask_for(task, length):
    for example in make(task, length):
        answers = SOLVERS[task](example.prompt)
        assert sorted(answers) == sorted(example.references) and len(set(answers)) == len(answers)
        if task not in ("cwe", "fwe"):  # there nothing is said of their order
            assert tuple(answers) == example.references or task == "niah_multivalue"
        half = answers[: len(answers) // 2]
        assert tasks.of(task).score(f" {', '.join(answers)}.\n\nMore", example.references) == 1.0
        assert tasks.of(task).score(" ".join(half), example.references) == len(half) / len(answers)
        assert (
            tasks.of(task).score("", example.references) == tasks.of(task).score("No idea", example.references) == 0.0
        )


COUNTS = {"niah_multikey_1": (4, 1), "niah_multivalue": (4, 4), "niah_multiquery": (4, 4)}  # needles, answers


@pytest.mark.parametrize("task", NIAH)
def test_needles(task):
    """Each once, at places all over the text, keys and values different from all others."""
    shape = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if NIAH[task].value == "uuid" else r"\d{7}"
    depths = []
    for example in make(task, 2000, range(25)):
        hidden = re.findall(r"One of the special magic \w+s for (\S+) is: (\S+)\.", example.prompt)
        keys, values = zip(*hidden, strict=True)
        assert len(set(values)) == len(values) and len(set(keys)) == (1 if task == "niah_multivalue" else len(keys))
        needles, answers = COUNTS.get(task, (1, 1))
        assert len(example.references) == answers and all(re.fullmatch(shape, value) for value in values)
        assert len(hidden) > 20 if NIAH[task].haystack == "needle" else len(hidden) == needles
        assert all(example.prompt.count(value) == 1 for value in example.references)
        text = example.prompt.rsplit("\nWhat ", 1)[0]
        depths.append(text.index(example.references[0]) / len(text))
    assert min(depths) < 0.2 and max(depths) > 0.8 and len(set(depths)) > 15


def test_no_line_repeats_a_key_that_is_asked_for(monkeypatch):
    """Where keys are few: 25 of them, 24 in the lines."""
    monkeypatch.setattr(niah, "ADJECTIVES", ADJECTIVES[:5])
    monkeypatch.setattr(niah, "NOUNS", NOUNS[:5])
    for index in range(5):
        sample = niah.draw(niah.Needles("needle"), None, Case("niah_multikey_2", 100, index, 1))
        keys = re.findall(r"special magic numbers for (\S+) is", sample.prompt(24))
        assert len(keys) == len(set(keys)) == 25


def test_wording():
    one = make("niah_single_1", 700, [3])[0]
    key = re.search(r"for (\S+) is: ", one.prompt)[1]
    needle = f"One of the special magic numbers for {key} is: {one.references[0]}.\n"
    assert one.prompt.replace(needle, "").replace(f"{NOISE}\n", "") == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the number afterwards.\nWhat is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )
    many = make("niah_multiquery", 700, [3])[0].prompt
    assert many.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    listed = r"(\w+-\w+, ){3}and \w+-\w+"
    assert re.search(
        rf"\nWhat are all the special magic numbers for ({listed}) mentioned in the provided text\? "
        r"The special magic numbers for \1 mentioned in the provided text are$",
        many,
    )


def test_variables_come_after_a_worked_example():
    for example in make("vt", 2000):
        shown, asked = example.prompt.split("\n\nMemorize")
        value = re.search(r"VAR [A-Z]{3} = (\d{5})\n", shown)[1]
        assert shown.endswith(f"5 variables are assgined the value {value}, they are: {' '.join(solve_vt(shown))}")
        assert all(re.fullmatch("[A-Z]{3}", name) for name in solve_vt(shown))
        assert value not in asked and asked.endswith("they are:") and all(len(name) == 5 for name in example.references)


@pytest.mark.parametrize(("length", "shown", "counts"), [(3000, (20, 3, 1), (6, 1)), (4096, (40, 10, 3), (30, 3))])
def test_common_words_come_after_a_worked_example(length, shown, counts):
    for example in make("cwe", length):
        first, second = example.prompt.split("\nBelow is ")
        listed, answer = first.split("the list are:")
        words = Counter(re.findall(r"\d+\. (\S+)", listed))
        assert (len(words), *sorted(set(words.values()), reverse=True)) == shown
        assert set(re.findall(r"\d+\. (\S+)", answer)) == {word for word in words if words[word] == shown[1]}
        asked = Counter(re.findall(r"\d+\. (\S+)", second))
        assert {asked[word] for word in example.references} == {counts[0]} and not words.keys() & asked.keys()
        assert {asked[word] for word in asked if word not in example.references} == {counts[1]}


def test_frequent_words():
    for example in make("fwe", 4096):
        counted = Counter(example.prompt.split("coded words. ")[1].split("\nQuestion")[0].split())
        (dots, most), *ranked = counted.most_common()
        assert dots == "..." and tuple(word for word, _ in ranked[:3]) == example.references
        assert ranked[2][1] > ranked[3][1] and all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)
        assert [times / most for _, times in ranked[:3]] == pytest.approx([1 / 4, 1 / 9, 1 / 16], rel=0.05)


# Lengths
@pytest.mark.parametrize("task", MAX_NEW_TOKENS)
def test_prompt_and_answer_fill_the_length(task, data, count_bpe):
    for count, length in ((count_words, 2000), (count_words, 8192), (count_bpe, 8192)):
        left = []
        for example in make(task, length, range(3), count=count, data=data):
            assert example.max_new_tokens == MAX_NEW_TOKENS[task] and example.task == task
            left.append(length - count(example.prompt) - example.max_new_tokens)
        if not task.startswith("qa_") or length == 2000:  # these files end before such a length
            assert 0 <= min(left) and max(left) < 130, left


@pytest.mark.parametrize("guess", [0, 7, 5000])
@pytest.mark.parametrize("unit", [1, 3, 26])
@pytest.mark.parametrize("wobble", [0, 5])
def test_largest_size(guess, unit, wobble):
    for budget in (99, 100, 130, 5000):
        calls = []

        def cost(size, calls=calls):
            calls.append(size)
            return 100 + unit * (size - 4) + (size * 7919 % (wobble + 1) if size > 4 else 0)

        found = largest_size(cost, budget, 4, 1000, guess)
        if budget < 100:
            assert found is None
        else:
            assert cost(found) <= budget and (found == 1000 or cost(found + 1) > budget)
            assert len(calls) < 25


@pytest.mark.parametrize("task", MAX_NEW_TOKENS)
def test_a_length_that_is_too_short(task, data):
    with pytest.raises(ConfigError) as caught:
        make(task, 60, data=data)
    message = str(caught.value)
    assert message.startswith(f"{task} at length 60: the smallest haystack, the question and the answer take ")
    least, enough = map(int, re.search(r"take up to (\d+) tokens; evaluate at (\d+) or more$", message).groups())
    assert 64 < enough - least <= 128 and len(make(task, enough, data=data)) == 6  # the remedy helps
    for length in (-1, 0, least - 10):
        with pytest.raises(ConfigError, match=f"evaluate at {enough} or more|evaluate at {enough + 64} or more"):
            make(task, length, data=data)


# Draws
@pytest.mark.parametrize("task", MAX_NEW_TOKENS)
def test_a_sample_depends_on_seed_task_length_and_index_alone(task, data):
    samples = make(task, 2000, range(6), data=data)
    assert make(task, 2000, [4, 2], data=data) == [samples[4], samples[2]]
    assert [example.index for example in samples] == list(range(6))
    assert len({example.prompt for example in samples}) == 6
    other = make(task, 2000, range(6), seed=2, data=data) + make(task, 2600, range(6), data=data)
    assert not {example.prompt for example in other} & {example.prompt for example in samples}
    if not task.startswith("qa_"):
        assert not {example.references for example in other} & {example.references for example in samples}


def test_samples_are_the_same_everywhere():
    """Two samples of seed 1, whatever the machine, the process or the version of Python."""
    tasks_without_prose = [task for task in GENERATED if not haystack_of(task)]
    text = "".join(example.prompt for task in tasks_without_prose for example in make(task, 3000, [0, 7]))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "644749e28e87673a"


def test_words():
    words = ADJECTIVES + NOUNS + VERBS
    assert len(words) == len(set(words)) > 2400
    joined = f" {' '.join(words)} "
    assert not [word for word in words if joined.count(word) > 1], "containment would take one for another"


# Haystacks of prose
def test_essays_of_the_user(tmp_path):
    (tmp_path / "b.txt").write_text("Second essay!  It\nends. ", encoding="utf-8")
    (tmp_path / "a.txt").write_text("First essay. " + "word " * 100, encoding="utf-8")
    prose = read_prose(str(tmp_path))
    assert prose.sentences[0] == "First essay." and prose.sentences[-2:] == ("Second essay!", "It ends.")
    assert [len(sentence.split()) for sentence in prose.sentences] == [2, 60, 40, 2, 2]
    assert prose.take(6)[-1] == "First essay." and prose.description.startswith(f"essays of {tmp_path} (106 words, sha")
    example = make("niah_single_2", 1000, [0], essays=str(tmp_path))[0]
    assert example.prompt.count("First essay.") > 1 and haystack_of("niah_single_2", str(tmp_path)) == prose.description
    assert haystack_of("niah_single_1") == haystack_of("vt") == ""


def test_prose_of_the_manual():
    prose = read_prose("")
    assert read_prose("") == prose and f"Python {sys.version.split()[0]}, no essays" in prose.description
    assert sum(len(sentence.split()) for sentence in prose.sentences) > 15_000
    assert len(set(prose.sentences)) > 0.95 * len(prose.sentences)
    assert not [sentence for sentence in prose.sentences if "special magic" in sentence or len(sentence.split()) > 60]


def test_essays_that_are_missing(tmp_path):
    with pytest.raises(ConfigError, match="essays: .*gone: no such file or folder"):
        make("niah_single_2", 1000, essays=str(tmp_path / "gone"))
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="essays: .*: holds no text; name a file or folder that does"):
        make("niah_single_2", 1000, essays=str(tmp_path))


# Questions
@pytest.mark.parametrize("task", ["qa_squad", "qa_hotpot"])
def test_questions_on_documents(task, data):
    asked = []
    for example in make(task, 1600, range(25), data=data):
        assert example.prompt.startswith(
            "Answer the question based on the given documents. Only give me the answer and "
        )
        question = re.search(r"\n\nQuestion: (.*) Answer:$", example.prompt)[1]
        asked.append(question)
        documents = re.findall(r"Document (\d+):\n(.*?)\n\n", example.prompt, re.DOTALL)
        assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
        assert len({text for _, text in documents}) == len(documents) > 10
        holding = [int(number) for number, text in documents if re.search(rf"\b{example.references[0]}\b", text)]
        assert len(holding) == (1 if task == "qa_squad" else 10)
        assert tasks.of(task).score(f"It is {example.references[-1]}", example.references) == 1.0
        assert tasks.of(task).score("", example.references) == tasks.of(task).score("None?", example.references) == 0.0
        assert len(set(example.references)) == len(example.references) == (2 if task == "qa_squad" else 1)
    assert len(set(asked)) == 25
    longer = make(task, 2000, range(25), data=data)
    assert [re.search(r"Question: (.*) Answer:$", example.prompt)[1] for example in longer] == asked


def test_documents_of_the_same_article_come_first(data):
    example = make("qa_squad", 600, [0], data=data)[0]
    assert len(set(re.findall(r"of article (\d)", example.prompt))) == 1


def test_no_more_documents_than_there_are(data):
    example = make("qa_squad", 100_000, [0], data=data)[0]
    assert len(re.findall(r"Document \d+:", example.prompt)) == 48


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, r"qa_squad: .*squad.json: no such file; it needs SQuAD 2.0's dev-v2.0.json as squad.json"),
        ("[1", r"not in the form of SQuAD 2.0's dev-v2.0.json \(JSONDecodeError: .*\); replace it"),
        ("[]", r"not in the form of .* \(TypeError: "),
        ('{"version": 2}', r"\(KeyError: 'data'\)"),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": 5, "answers": [{"text": "x"}]}]}]}]}',
            "5 where",
        ),
        ('{"data": []}', "holds no questions with an answer; replace it"),
    ],
)
def test_bad_question_files_are_named(tmp_path, content, expected):
    if content:
        (tmp_path / "squad.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=expected):
        make("qa_squad", 4096, data=str(tmp_path))


def test_other_errors(data):
    with pytest.raises(ConfigError, match="qa_hotpot: no data folder is named; it needs HotpotQA's"):
        make("qa_hotpot", 4096)
    with pytest.raises(ConfigError, match="qa_hotpot: sample 30 of 30 questions; ask for fewer samples"):
        make("qa_hotpot", 4096, [30], data=data)
    with pytest.raises(ConfigError, match="niah: no task of RULER; these are niah_single_1, "):
        make("niah", 4096)


def test_no_torch():
    """Samples are made and scored where no torch is needed, or installed."""
    code = (
        "import sys; from megatron_refine.eval import files, tasks; from megatron_refine.eval.ruler import generate; "
        "next(generate('vt', 4000, [0], 1, len)); tasks.of('qmsum').score('a', ['a']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
