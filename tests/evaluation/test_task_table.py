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


def test_the_protocol_stands_below_where_there_is_one():
    task = {**TASK, "protocol": "p:v1"}
    assert task_text(task).splitlines()[-2:] == ["Lower is better.", "Protocol: p:v1."]
    assert task_markdown(task).endswith("Lower is better.\n\nProtocol: p:v1.")


def test_markdown_is_a_table():
    assert "| caption loss | 1.250 nats | 3.000 nats |" in task_markdown(TASK)


def test_a_share_has_wilsons_interval_and_a_loss_its_own():
    rows = [
        {"what": "right", "value": 90.0, "unit": "%", "chance": 10.0, "n": 100},
        {"what": "loss", "value": 1.25, "unit": "nats", "chance": None, "ci95": [1.2, 1.3]},
    ]
    text = task_text({"title": "t", "rows": rows})
    assert "90.0 % [82.6, 94.5]" in text
    assert "1.250 nats [1.200, 1.300]" in text
    assert "| loss | 1.250 nats [1.200, 1.300] | - |" in task_markdown({"title": "t", "rows": rows})
