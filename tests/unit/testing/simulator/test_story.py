"""What is told of a failure: the faults and the messages concerned, in order, and how much is left out."""

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.unit.testing.simulator.shipping import HastyBank, SaleMade, make
from trunkline import Service, Struct, Topic
from trunkline.testing.simulator import Simulation, Tape, World
from trunkline.testing.simulator.campaign import Plan, carry_out, repeat
from trunkline.testing.simulator.diagram import places, to_mermaid, to_svg
from trunkline.testing.simulator.story import LINES, tell


@pytest.fixture(scope="module")
def failure():
    (found,) = carry_out(make(HastyBank), Plan(points=False)).failures
    return found


@pytest.fixture(scope="module")
def story(failure):
    return tell(failure)


def of_tape(choices, promise="", **options):
    """Return the story of what one tape breaks."""
    return tell(repeat(make(HastyBank, **options), Tape(choices), promise))


def test_a_story_names_message_node_fault_and_place_in_order(story):
    text = story.text()
    told = re.findall(
        r"client +sends sale\.made s-1 #1|till +has Bank\.charge\(<id of sale\.made s-1 #1>, 100\) done"
        r"|till +CRASHES before its step \d+, with sale\.made s-1 #1.* under way; it was in charge \(shipping\.py:\d+\)"
        r"|till +starts again|hands sale\.made s-1 #1 again|till +commits: sale\.made s-1 #1 handled",
        text,
    )
    assert [line.split()[1] for line in told if line.startswith("till")] == [
        "has", "CRASHES", "starts", "has", "commits:"
    ]  # fmt: skip
    assert told[0].startswith("client")
    assert text.startswith("broken: eventually charged_once\n  AssertionError: the bank has taken ")


def test_what_has_nothing_to_do_with_it_is_left_out_and_counted(story):
    text = story.text()
    assert "s-2" not in text.partition("left out:")[0].replace("and 1 more", "")
    assert re.search(r"left out: \d+ messages \(sale\.made s-2 #\d.*\); \d+ steps of the network", text)


def test_the_whole_story_has_everything(story):
    text = story.text(everything=True)
    assert "s-2" in text
    assert "network: till → broker: connect" in text
    assert "tells the broker that" in text


def test_a_fault_is_told_with_what_it_is_and_where():
    story = of_tape({"answer_lost": {0: 1}})
    assert "FAULT answer_lost (till → Bank: charge): an outside service has done what was asked" in story.text()
    assert "1 fault (answer_lost)" in story.text()


def test_a_story_ends_where_the_promise_was_broken():
    def nothing_sold(view):
        return view.rows("till", "SELECT count(*) FROM sale")[0][0] == 0

    story = of_tape({}, always=[nothing_sold], eventually=[])
    assert story.lines[-1].mark == "broken"
    assert "always nothing_sold: it returned False" in story.lines[-1].text
    assert all(line.at <= story.lines[-1].at for line in story.lines)
    assert re.search(r"\d+ events after it was broken", story.left_out)


def test_a_long_story_is_cut_in_the_middle_but_for_what_went_wrong():
    async def many(sim):
        for number in range(40):
            await sim.publish(SaleMade(f"s-{number}", 1))

    story = of_tape({"answer_lost": dict.fromkeys(range(20), 1)}, workload=many, eventually=[lambda _view: False])
    shown = story.short()
    assert LINES < len(shown) < len(story.lines)
    assert any(isinstance(line, str) and re.fullmatch(r"  … \d+ lines", line) for line in shown)
    assert [str(line) for line in shown if "FAULT" in str(line)] == [
        str(line) for line in story.lines if line.mark == "fault"
    ]


def test_tries_that_fail_alike_are_one_line_with_the_place_in_the_users_code():
    class Closed:
        total = 0

        def charge(self, key, cents):
            raise ValueError("the bank is closed")

    story = tell(repeat(make(Closed, eventually=[]), Tape(), "no dead letters"))
    text = story.text()
    line = next(
        number
        for number, line in enumerate(Path(__file__).read_text().splitlines(), 1)
        if line.strip() == 'raise ValueError("the bank is closed")'
    )
    where = rf"in charge \(test_story\.py:{line}\)"
    tries = r"attempts 1 to \d+: ValueError: the bank is closed\n"
    assert re.search(rf"till +fails on sale\.made s-1 #1 {where}, {tries}", text)
    assert re.search(rf"till +gives up sale\.made s-1 #1 {where}, attempt \d+: handler ValueError", text)
    assert "commits: sale.made s-1 #1 set aside as a dead letter" in text


def test_a_run_without_a_story_keeps_no_events():
    result = World(make(), Tape(), random=False).run()
    assert (result.events, result.messages) == ([], {})


def test_what_there_is_nothing_to_say_of_ends_without_a_comma():
    telegrams = Topic("telegrams")

    @telegrams.event
    class Sent(Struct):
        number: str

    @telegrams.event
    class Unheard(Struct):
        number: str

    office = Service("office")

    @office.handle
    async def take(telegram: Sent) -> None:
        """Take it."""

    async def work(sim):
        await sim.publish(Unheard("t-1"))

    simulation = Simulation(office, work, eventually=[lambda _view: False])
    text = tell(repeat(simulation, Tape(), "")).text(everything=True)
    assert re.search(r"office +passed unheard \S*( #1)?\n", text)


# --- the diagram ---


def test_a_diagram_has_a_lifeline_for_everybody_concerned(story):
    assert places(story) == ["client", "till", "broker", "Bank"]
    texts = {text.text for text in ET.fromstring(to_svg(story)).iter("{http://www.w3.org/2000/svg}text")}
    assert set(places(story)) <= texts


def test_nothing_in_a_diagram_covers_another(story):
    boxes = [
        (float(box.get("x")), float(box.get("y")), float(box.get("width")), float(box.get("height")))
        for box in ET.fromstring(to_svg(story)).iter("{http://www.w3.org/2000/svg}rect")
        if box.get("class")
    ]
    assert len(boxes) > len(places(story)) + 2
    for number, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[:number]:
            apart = (
                x >= other_x + other_width
                or other_x >= x + width
                or y >= other_y + other_height
                or other_y >= y + height
            )
            assert apart


def test_a_diagram_escapes_what_the_user_wrote():
    def less(view):
        raise AssertionError("1 < 2 & 3 > 2")

    drawing = to_svg(of_tape({}, eventually=[less]))
    assert "1 < 2 & 3 > 2" in " ".join(ET.fromstring(drawing).itertext())


def test_what_was_lost_does_not_arrive_in_a_diagram():
    stories = (of_tape({"request_lost": {number: 1}}, eventually=[lambda _view: False]) for number in range(20))
    story = next(story for story in stories if "client → broker: publish" in story.text())
    assert [(line.who, line.to, line.label) for line in story.lines if line.lost] == [
        ("client", "broker", "sale.made s-1 #1")
    ]  # fmt: skip
    assert "-x" in to_mermaid(story)
    assert "✕" in to_svg(story)


def test_mermaid_has_a_line_for_each_arrow_and_note(story):
    lines = to_mermaid(story).splitlines()
    assert lines[0] == "sequenceDiagram"
    assert lines[1:5] == [f"    participant p{number} as {name}" for number, name in enumerate(places(story))]
    assert any(re.fullmatch(r"    p0->>p2: 0\.\d{3} s sale\.made s-1 #35;1", line) for line in lines)
    assert any(re.match(r"    Note over p1: 0\.\d{3} s ⚡ CRASHES", line) for line in lines)
