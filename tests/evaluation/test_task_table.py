"""What an approach measures of itself, as text and Markdown."""

from wlsup.evaluation.task_table import task_markdown, task_text

TASK = {
    "title": "captioning",
    "rows": [
        {"what": "caption loss", "value": 1.25, "unit": "nats", "chance": 3.0},
        {"what": "accuracy", "value": 41.25, "unit": "%", "chance": None},
    ],
    "note": "Lower is better.",
}


def test_every_figure_is_there_with_its_unit_and_chance():
    lines = task_text(TASK).splitlines()
    assert lines[0] == "captioning"
    assert lines[-1] == "Lower is better."
    assert lines[3].split() == ["caption", "loss", "1.250", "nats", "3.000", "nats"]
    assert lines[4].split() == ["accuracy", "41.2", "%", "-"]


def test_markdown_is_a_table():
    assert "| caption loss | 1.250 nats | 3.000 nats |" in task_markdown(TASK)
