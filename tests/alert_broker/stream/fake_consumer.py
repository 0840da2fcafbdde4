"""A consumer whose messages and rebalances are a script."""

from dataclasses import dataclass

from confluent_kafka import KafkaError, KafkaException, TopicPartition


@dataclass
class FakeMessage:
    """As far as the source looks at one."""

    number: int
    at: int
    fault: KafkaError | None = None
    size: int = 100

    def __len__(self):
        return self.size

    def topic(self):
        return "t"

    def partition(self):
        return self.number

    def offset(self):
        return self.at

    def error(self):
        return self.fault


class FakeConsumer:
    """Gives a list of messages per call; a function in it is called first, as a rebalance would be."""

    def __init__(self):
        self.script, self.callbacks, self.commits, self.asked = [], {}, [], []
        self.member = "m"
        self.starts = {}
        self.stored, self.logs = {}, {}  # offsets of the group; where logs begin and end, if the broker answers
        self.asked_logs = []  # partitions whose logs were asked for
        self.commit_errors = []  # errors of the next commits; None for a commit that succeeds
        self.assigned, self.asleep = set(), set()  # `asleep`: as in librdkafka, it outlives the assignment

    def subscribe(self, topics, **callbacks):
        self.callbacks = callbacks

    def consume(self, size, seconds):
        self.asked.append(size)
        item = self.script.pop(0) if self.script else []
        return item(self) if callable(item) else item

    def commit(self, offsets, asynchronous):
        if (error := self.commit_errors.pop(0) if self.commit_errors else None) is not None:
            raise KafkaException(error)
        self.commits.append([(item.topic, item.partition, item.offset) for item in offsets])

    def incremental_assign(self, partitions):
        self.assigned |= {item.partition for item in partitions}
        self.starts |= {item.partition: item.offset for item in partitions}

    def assignment(self):
        return [TopicPartition("t", number) for number in self.assigned]

    def pause(self, partitions):
        self.asleep |= {item.partition for item in partitions}

    def resume(self, partitions):
        self.asleep -= {item.partition for item in partitions}

    def incremental_unassign(self, partitions):
        self.assigned -= {item.partition for item in partitions}

    def committed(self, partitions, timeout):
        return [TopicPartition("t", item.partition, self.stored.get(item.partition, -1001)) for item in partitions]

    def get_watermark_offsets(self, partition, timeout):
        self.asked_logs.append(partition.partition)
        if partition.partition not in self.logs:
            raise KafkaException(KafkaError(KafkaError._TRANSPORT))
        return self.logs[partition.partition]

    def memberid(self):
        return self.member

    def consumer_group_metadata(self):
        return "metadata"


class FakeLag:
    """ends: what the broker would tell."""

    admin = None

    def __init__(self, config):
        self.ends = {}

    def look(self, ours, positions):
        return {at: max(0, self.ends[at] - positions.get(at, 0)) for at in ours if at in self.ends}

    def forget(self, where):
        pass


class FakeTopicIds:
    """new: topics that were created again."""

    def __init__(self, admin, topics):
        self.new = []

    def changed(self):
        found, self.new = self.new, []
        return found


def assign(consumer, *numbers):
    consumer.callbacks["on_assign"](consumer, [TopicPartition("t", number) for number in numbers])


def revoke(consumer, *numbers):
    consumer.callbacks["on_revoke"](consumer, [TopicPartition("t", number) for number in numbers])
    consumer.assigned -= set(numbers)


def messages(number, *offsets):
    return [FakeMessage(number, offset) for offset in offsets]


def indices(batch):
    return [(batch.partitions[k][1], offset) for k, offset in zip(batch.partition, batch.offset.tolist(), strict=True)]


NO_POSITION = KafkaError(KafkaError._AUTO_OFFSET_RESET)


def no_position(number, offset):
    """The group has committed this offset, which is outside the log; None for nothing."""
    return FakeMessage(number, offset, NO_POSITION)
