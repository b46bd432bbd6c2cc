"""The client: trains on its own texts, and sends back memories and head."""

from __future__ import annotations

from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from federated_memories.task import Task, client_rows, load, receive, score, train, travelling


def count_bytes(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Add to the reply's metrics what it and the message take on the wire."""
    num_received = serialized_bytes(message.content)
    reply = call_next(message, context)
    if reply.has_content():
        num_sent = serialized_bytes(reply.content)
        metrics = next(iter(reply.content.metric_records.values()))
        metrics["bytes-down"], metrics["bytes-up"] = num_received, num_sent
    return reply


def serialized_bytes(record: Any) -> int:
    """Bytes of a record as Flower sends it: an object for each part, equal ones of a record once."""
    return len(record.deflate()) + sum(map(serialized_bytes, (record.children or {}).values()))


app = ClientApp(mods=[count_bytes])


@app.train()
def train_part(message: Message, context: Context) -> Message:
    """Train from the weights received; the reply has the new ones, and the number of texts that they count with."""
    task, config = _task(message, context), message.content["config"]
    rows = _rows(task, task.data.train, context)
    seed = task.config.seed + 1000 * config["server-round"] + int(context.node_config["partition-id"])
    steps = train(task, rows, context.run_config["local-epochs"], seed, config.get("proximal-mu", 0.0))
    arrays, metrics = (
        ArrayRecord(travelling(task.built.model)),
        MetricRecord({"num-examples": len(rows), "steps": steps}),
    )
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate_part(message: Message, context: Context) -> Message:
    """Score the weights received on the client's held-out texts."""
    task = _task(message, context)
    rows = _rows(task, task.data.selection, context)
    metrics = MetricRecord({"num-examples": len(rows), **score(task, rows)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def _task(message: Message, context: Context) -> Task:
    """The task with the weights received."""
    task = load(context.run_config)
    receive(task.built.model, message.content["arrays"].to_torch_state_dict())
    return task


def _rows(task: Task, rows: Any, context: Context) -> Any:
    """Those rows that this client has."""
    node = context.node_config
    return client_rows(
        task, rows, context.run_config["partition"], int(node["partition-id"]), int(node["num-partitions"])
    )
