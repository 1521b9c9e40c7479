"""What the dashboard's pages are put together from: text, times, charts, redaction, its short history."""

from __future__ import annotations

import re
from importlib import resources

import msgspec
import pytest

from leveret import App
from leveret.dashboard import by_name, charts, text, views
from leveret.dashboard.history import KEPT, STEP, Recent, Sample
from leveret.dashboard.redaction import HIDDEN, Redact, arguments, result
from leveret.model import Envelope, QueueStats
from leveret.model.printable import in_line, printable
from leveret.model.reports import WorkerReport
from leveret.model.status import Moment, Progress, Status

app = App("memory://")


@app.task(queue="work")
async def sign_up(name: str, password: str, **more: object) -> None: ...


@app.task(queue="work")
def take_in(body: bytes) -> None: ...


def call(body: bytes, task: str | None = "sign_up") -> Envelope:
    return Envelope("1", "work", task, body)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain\n\ttext é שלום 🐇", "plain\n\ttext é שלום 🐇"),
        ("\x1b[31m", r"\x1b[31m"),
        ("a\u202eb\u2066c\u200fd", r"a\u202eb\u2066c\u200fd"),
        ("\x00\x7f\x85", r"\x00\x7f\x85"),
        ("\ud800", r"\ud800"),
        ("\u2028\ufeff", r"\u2028\ufeff"),
    ],
)
def test_what_cannot_be_seen_is_written_out(given: str, shown: str) -> None:
    assert printable(given) == shown
    assert in_line(given) == shown.replace("\n", r"\n").replace("\t", r"\t")


def test_long_texts_are_cut() -> None:
    assert text.short("x" * 1_000) == "x" * 119 + "…"
    assert text.short("two\nlines") == "two lines"
    long = text.long("a" * 15_000 + "b" * 15_000)
    assert len(long) < 21_000
    assert long.startswith("aaa")
    assert long.endswith("bbb")
    assert "10000 characters left out" in long


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0123, "12 ms"),
        (1.26, "1.3 s"),
        (59.4, "59 s"),
        (61, "1 min"),
        (7_300, "2 h"),
        (200_000, "2 d"),
        (None, text.UNKNOWN),
    ],
)
def test_a_length_of_time_is_in_the_unit_that_fits(seconds: float, shown: str) -> None:
    assert text.lasted(seconds) == shown


@pytest.mark.parametrize("seconds", [float("inf"), 1e300, -1e300, float("nan")])
def test_a_time_that_is_none_is_shown_all_the_same(seconds: float) -> None:
    assert text.moment(seconds)
    assert text.clock(seconds)


@pytest.mark.parametrize("name", ["a b", "ä/ö?#&%41", "\x00\r\n", "\ud800", "../..", '"><script>'])
def test_a_name_comes_back_from_a_form_unchanged(name: str) -> None:
    assert re.fullmatch(r"[\w.~%-]*", text.packed(name), re.ASCII)
    assert text.unpacked(text.packed(name)) == name


def test_arguments_have_the_names_of_the_parameters() -> None:
    shown = arguments(app, call(b'{"args": ["Ann"], "kwargs": {"password": "x", "age": [1, 2]}}'), None)
    assert [(one.name, one.value) for one in shown] == [
        ("name", '"Ann"'),
        ("password", '"x"'),
        ("age", "[\n  1,\n  2\n]"),
    ]
    assert [one.name for one in arguments(app, call(b'{"args": [1, 2]}', "not here"), None)] == ["0", "1"]
    assert [one.value for one in arguments(app, call(b"\xffhello"), None)] == ["\\xffhello"]


def test_names_are_redacted_wherever_they_are() -> None:
    redact = by_name(["password"])
    body = (
        b'{"args": ["Ann", "secret1"], "kwargs": {"more": {"password": "secret2", "list": [{"password": "secret3"}]}}}'
    )
    shown = {one.name: one.value for one in arguments(app, call(body), redact)}
    assert shown["name"] == '"Ann"'
    assert shown["password"] == HIDDEN
    assert "secret" not in str(shown)
    # Whose names are not known, or whose form is not, may hold anything.
    assert "secret" not in str(arguments(app, call(body, "not here"), redact))
    assert "secret" not in str(arguments(app, call(b"secret"), redact))
    assert "secret" not in result("sign_up", b'{"password": "secret4"}', redact)
    assert result("sign_up", b'"secret5"', by_name(["return"])) == HIDDEN


@pytest.mark.parametrize("task", ["take_in", "not here"])
def test_a_foreign_body_is_no_call_without_arguments(task: str) -> None:
    envelope = call(b'{"card": "secret"}', task)
    assert [(one.name, one.value) for one in arguments(app, envelope, None)] == [("body", '{"card": "secret"}')]
    assert [(one.name, one.value) for one in arguments(app, envelope, by_name(["x"]))] == [
        ("body", "(18 bytes, hidden)")
    ]
    assert arguments(app, call(b'{"args": []}', "not here"), None) == []


@pytest.mark.parametrize("redact", [None, by_name(["x"])])
@pytest.mark.parametrize("width", [2, 100_000])
def test_deep_arguments_do_not_grow(redact: Redact | None, width: int) -> None:
    body = b'{"args": [' + b"[" * 150 + b",".join([b"1"] * width) + b"]" * 150 + b'], "kwargs": {}}'
    (one,) = arguments(app, call(body), redact)
    assert len(one.value) <= len(body)


def test_a_redaction_that_fails_shows_nothing() -> None:
    def fail(task: str | None, name: str, value: object) -> object:
        raise KeyError(task, name, value)

    (one, *_) = arguments(app, call(b'{"args": ["secret"]}'), fail)
    assert one.value == "(hidden: redact raised KeyError)"


def test_a_users_redaction_sees_task_name_and_value() -> None:
    seen: list[tuple[str | None, str, object]] = []

    def note(task: str | None, name: str, value: object) -> object:
        seen.append((task, name, value))
        return {"shown": value}

    (one,) = arguments(app, call(b'{"args": ["Ann"]}'), note)
    assert seen == [("sign_up", "name", "Ann")]
    assert one.value == '{\n  "shown": "Ann"\n}'


def stats(ready: int = 0, dead: int = 0) -> list[QueueStats]:
    return [QueueStats("work", ready, 0, dead, 1)]


def report(finished: int, failed: int, name: str = "here:1", since: float = 0.0) -> WorkerReport:
    return WorkerReport(name, since, ["work"], [], 0, finished, failed)


def test_rates_come_from_what_the_workers_have_counted() -> None:
    recent = Recent()
    recent.add(100.0, stats(), [report(50, 5)])
    (first,) = recent.samples
    assert first.finished is None
    recent.add(102.0, stats(), [report(70, 6)])
    assert recent.samples[-1].finished == 10.0
    assert recent.samples[-1].failed == 0.5
    recent.add(104.0, stats(), [])  # it does not answer
    recent.add(106.0, stats(), [report(72, 6), report(8, 0, "here:2", since=105.0)])
    assert recent.samples[-1].finished == 5.0  # the new worker's all, and what the old one did since it was heard last
    recent.add(108.0, stats(), [report(72, 6), report(1_000, 0, "elsewhere:3", since=1.0)])
    assert recent.samples[-1].finished == 0.0  # it was not known before, and did that over days


def test_run_times_are_those_of_the_last_half_minute() -> None:
    recent = Recent()
    for seconds in (1.0, 2.0, 30.0):
        recent.ran(seconds)
    recent.add(100.0, stats(), [])
    assert recent.samples[-1].slow == 30.0
    recent.ran(0.0)
    recent.add(102.0, stats(), [])
    assert [one.median for one in recent.samples] == [2.0, 1.5], "one short task does not hide the others"
    for number in range(20):
        recent.add(104.0 + STEP * number, stats(), [])
    assert [one.median for one in recent.samples][-8:-5] == [1.5, 0.0, None]
    for number in range(20, 2 * KEPT):
        recent.add(104.0 + STEP * number, stats(), [])
    assert [one.median for one in list(recent.samples)[-3:]] == [None] * 3
    assert len(recent.samples) == KEPT


def test_a_chart_is_drawn_to_scale() -> None:
    samples = [Sample(0.0, {"work": stats(ready=ready)[0]}) for ready in (0, 5, 10)]
    chart = charts.depth(samples, "work")
    ready = chart.lines[0]
    assert chart.top == "10"
    assert ready.now == "10"
    points = re.findall(r"([\d.]+),([\d.]+)", ready.path)
    assert [float(y) for _, y in points] == [100.0, 50.0, 0.0]
    assert float(points[-1][0]) == charts.WIDTH
    assert "ready 10" in chart.summary


def test_the_lines_of_a_scale_are_named_exactly() -> None:
    samples = [Sample(0.0, {"work": stats(ready=5)[0]}, median=0.0042, slow=0.0042)]
    assert (charts.depth(samples).top, charts.depth(samples).middle) == ("5", "2.5")
    assert (charts.run_time(samples).top, charts.run_time(samples).middle) == ("5 ms", "2.5 ms")
    assert charts.run_time([]).middle == "0.5 ms"
    assert [text.mark(seconds) for seconds in (2.5, 25, 500, 5_000)] == ["2.5 s", "25 s", "8.3 min", "1.4 h"]
    assert text.rate(123.4) == "123"


def test_lines_in_the_same_place_are_all_seen() -> None:
    """Each step is drawn by one of them, and each of them draws some."""
    chart = charts.throughput([Sample(0.0, {}, 1.0, 1.0 if number < 30 else 0.0) for number in range(60)])
    drawn = [_steps(line.path) for line in chart.lines]
    shared = [{step for step in steps if step < 30} for steps in drawn]
    assert not shared[0] & shared[1]
    assert shared[0] | shared[1] == set(range(1, 30))
    assert min(map(len, shared)) >= 12
    assert all(set(range(30, 60)) <= steps for steps in drawn), "apart they are whole"


def _steps(path: str) -> set[int]:
    """Up to which steps of 60 a line is drawn."""
    width = charts.WIDTH / (KEPT - 1)
    begin = charts.WIDTH - width * 59
    pieces = [re.findall(r"([\d.]+),", piece) for piece in path.split("M")]
    return {round((float(x) - begin) / width) for piece in pieces for x in piece[1:]}


def test_a_chart_has_gaps_where_nothing_is_known() -> None:
    chart = charts.throughput([Sample(0.0, {}, value, value) for value in (1.0, None, 3.0)])
    assert chart.lines[0].path.count("M") == 2
    assert charts.run_time([]).lines[0].path == ""
    assert charts.run_time([]).lines[0].now == text.UNKNOWN


@pytest.mark.parametrize(("value", "top"), [(0.3, 0.5), (1, 1), (1.1, 2), (4.2, 5), (51, 100), (100, 100), (101, 200)])
def test_the_upper_edge_is_a_round_number(value: float, top: float) -> None:
    assert charts.round_up(value) == pytest.approx(top)


def test_a_timeline_tells_how_long_each_state_was() -> None:
    status = Status(
        *("1", "dead", 20.0, "work", "sign_up", 2),
        started_at=15.0,
        enqueued_at=0.0,
        history=[Moment(0.0, "queued", 1), Moment(3.0, "running", 1), Moment(10.0, "retrying", 2, "not yet")],
    )
    steps = views.timeline(status)
    assert [(one.state, one.lasted) for one in steps] == [
        ("queued", 3.0),
        ("running", 7.0),
        ("retrying", 10.0),
        ("dead", None),
    ]
    assert steps[2].error == "not yet"


def test_a_short_tasks_timeline_has_its_start() -> None:
    status = Status("1", "succeeded", 10.5, "work", "sign_up", enqueued_at=8.0, started_at=10.0)
    assert [(one.state, one.at) for one in views.timeline(status)] == [
        ("queued", 8.0),
        ("running", 10.0),
        ("succeeded", 10.5),
    ]


def test_the_timeline_of_a_task_that_began_at_once_has_its_wait() -> None:
    past = [Moment(9.0, "running", 1), Moment(12.0, "retrying", 2, "not yet")]
    status = Status("1", "running", 14.0, "work", "sign_up", 2, enqueued_at=8.5, started_at=14.0, history=past)
    assert [(one.state, one.at) for one in views.timeline(status)] == [
        ("queued", 8.5),
        ("running", 9.0),
        ("retrying", 12.0),
        ("running", 14.0),
    ]
    cut = msgspec.structs.replace(status, history=past * 15)
    assert views.timeline(cut)[0].at == 9.0, "the beginning is not kept"
    unknown = msgspec.structs.replace(status, enqueued_at=None)
    assert views.timeline(unknown)[0].at == 9.0


@pytest.mark.parametrize(
    ("progress", "percent"),
    [
        (Progress(3, 4), 75),
        (Progress(9, 4), 100),
        (Progress(-1, 4), 0),
        (Progress(3), None),
        (Progress(3, 0), None),
    ],
)
def test_progress_stays_within_its_bar(progress: Progress, percent: int | None) -> None:
    bar = views.bar(progress)
    assert bar is not None
    assert bar.percent == percent


def _luminance(colour: str) -> float:
    digits = colour if len(colour) == 6 else "".join(digit * 2 for digit in colour)
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (one / 12.92 if one <= 0.03928 else ((one + 0.055) / 1.055) ** 2.4 for one in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("behind", ["page", "surface", "raised"])
def test_the_edges_of_inputs_can_be_seen(scheme: int, behind: str) -> None:
    """WCAG 2.2, 1.4.11."""
    styles = resources.files("leveret.dashboard").joinpath("static", "dashboard.css").read_text()
    one, other = (_luminance(re.findall(rf"--{name}: #(\w+)", styles)[scheme]) for name in ("edge", behind))
    assert (max(one, other) + 0.05) / (min(one, other) + 0.05) >= 3


@pytest.mark.parametrize(
    "name", ["password", "Password", "PASSWORD", "pass_word", "pass-word", "passWord", "\uff50assword"]
)
def test_a_name_is_hidden_however_it_is_spelt(name: str) -> None:
    redact = by_name(["password"])
    assert redact(None, name, "secret") == HIDDEN
    assert redact(None, "user", {"deep": [{name: "secret"}], "other": 1}) == {"deep": [{name: HIDDEN}], "other": 1}
    assert by_name([name])(None, "password", "secret") == HIDDEN
    assert redact(None, "passwords", "shown") == "shown"
