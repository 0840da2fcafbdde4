"""Run the classifier inside Apache Spark: over packets from a Kafka source, or over columns as Fink stores alerts.

    alerts = spark.read.parquet("night/")               # or spark.readStream: the same in Structured Streaming
    classified = classify(alerts, bundle, keep=["publisher"])

Every input row gives one output row, in the same order, with the columns of `edgekit alerts classify` except file and
offset. For a row that cannot be read, `status` holds the reason. The model travels with the task as a packed bundle.
Each Python worker opens it once, with one thread, because Spark runs one worker for each core. edgekit must be
installed on the machines of the executors, in the environment whose interpreter PYSPARK_PYTHON names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from alert_broker.classify import Classifier
from alert_broker.containers import BadPacket, Block, message
from alert_broker.packets import ParquetRows, batches, leaves, survey_of
from alert_broker.results import fill, repeat, result_schema
from alert_broker.surveys.base import Survey, surveys
from edgekit.bundle.format import Bundle
from edgekit.bundle.pack import pack, unpack
from edgekit.errors import EdgekitError, missing_extra, unknown

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import DataFrame

BATCH = 1024  # rows that are classified together
LEFT_OUT = ("file", "offset")  # columns of the result that are left out: a table's row has no position in a file
SPARK_TYPES = {pa.string(): "string", pa.int64(): "bigint", pa.int32(): "int", pa.float32(): "float"}
NONE = "None"  # Fink's text for "no class"
# Fink's cuts before its t2 exclude known asteroids, alerts that last longer, and alerts with fewer points
MOVING, MAX_DAYS, MIN_POINTS = 3, 90.0, 2

ArrowFunction = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class SparkJob:
    """The model and the settings that a Python worker needs, small enough to travel with every task. The worker calls
    the job with one Arrow batch."""

    digest: str  # digest of the bundle that was packed; every result row shows it
    packed: bytes = field(repr=False)
    packets: str | None = None
    keep: tuple[str, ...] = ()
    runtime: str = "auto"

    def __call__(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Return one result row for each row, in the same order."""
        classifier = _open(self.digest, self.packed, self.runtime)
        schema = _schema(classifier.classes)
        parts = [self._classify(classifier, rows.slice(start, BATCH)) for start in range(0, rows.num_rows, BATCH)]
        table = pa.Table.from_batches(parts, result_schema(classifier.classes)).combine_chunks()
        columns = {name: table[name].combine_chunks() for name in schema.names}
        columns["bundle"] = repeat(self.digest[:12], rows.num_rows)
        kept = [rows.column(name) for name in self.keep]
        fields = [rows.schema.field(name) for name in self.keep]
        return pa.RecordBatch.from_arrays([*kept, *columns.values()], schema=pa.schema([*fields, *schema]))

    def _classify(self, classifier: Classifier, rows: pa.RecordBatch) -> pa.RecordBatch:
        schema = classifier.schema
        found: list[pa.RecordBatch] = []
        for item in batches(self._blocks(rows), BATCH):
            if isinstance(item, BadPacket):
                columns = {"status": repeat(f"{item.status}: {item.reason}", 1), "offset": pa.array([item.offset])}
                found.append(fill(columns, schema, 1))
            else:
                found.append(classifier(item))
        table = pa.Table.from_batches(found, schema).sort_by("offset").combine_chunks()
        if table["offset"].to_pylist() != list(range(rows.num_rows)):
            raise EdgekitError(
                f"{rows.num_rows} rows gave {table.num_rows} results; this is a bug in edgekit, please report it"
            )
        return table.to_batches()[0]

    def _blocks(self, rows: pa.RecordBatch) -> Iterator[Block | ParquetRows | BadPacket]:
        if self.packets is not None:
            for index, value in enumerate(rows.column(self.packets)):
                content = value.as_py()
                yield BadPacket("", index, "the message is null") if content is None else message(content, index)
            return
        survey = _survey(leaves(rows.schema))
        wanted = [name for name in survey.fields if name in rows.schema.names]
        yield ParquetRows(survey, "", 0, rows.select(wanted))


def map_in_arrow(
    bundle: Bundle, packets: str | None = None, *, keep: Sequence[str] = (), runtime: str = "auto"
) -> ArrowFunction:
    """Return the function for `DataFrame.mapInArrow`. Its result has the columns in `keep`, then those of
    `result_ddl(bundle)`.

    packets: the binary column that holds one packet per row; None if the packets' fields are columns, as in Fink's
    Parquet. Then only the survey's fields are needed (`classify` selects them). keep: other columns, which the result
    repeats.
    """
    job = _job(bundle, packets, keep, runtime)

    def run(rows: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return map(job, rows)

    return run


def classify(
    rows: DataFrame, bundle: Bundle, packets: str | None = None, *, keep: Sequence[str] = (), runtime: str = "auto"
) -> DataFrame:
    """Return the classified rows of a batch or a stream. The arguments are those of `map_in_arrow`. Only the needed
    fields leave the JVM."""
    from pyspark.sql import functions, types

    for name in (*keep, *([packets] if packets is not None else [])):
        if name not in rows.columns:
            raise unknown("column", name, rows.columns)
    if packets is not None and not isinstance(rows.schema[packets].dataType, types.BinaryType):
        dtype = rows.schema[packets].dataType.simpleString()
        raise EdgekitError(f"the column {packets!r} is of type {dtype}; expected binary, with one packet in each row")
    ours = {item.name.lower() for item in _schema(bundle.manifest.classes)}
    if clash := [name for name in keep if name.lower() in ours]:
        raise EdgekitError(f"keep: the result has columns of the same name ({', '.join(clash)}); rename yours first")
    needed = {packets: functions.col(packets)} if packets is not None else _fields(rows)
    chosen = rows.select(*keep, *(column for name, column in needed.items() if name not in keep))
    dtypes = {"string": types.StringType(), "bigint": types.LongType(), "int": types.IntegerType()}
    dtypes["float"] = types.FloatType()
    fields = [types.StructField(item.name, dtypes[SPARK_TYPES[item.type]]) for item in _schema(bundle.manifest.classes)]
    function = map_in_arrow(bundle, packets, keep=keep, runtime=runtime)
    return chosen.mapInArrow(function, types.StructType([*chosen.schema.fields[: len(keep)], *fields]))


def result_ddl(bundle: Bundle) -> str:
    """Return the result's columns as Spark's SQL writes them."""
    return ", ".join(f"`{item.name}` {SPARK_TYPES[item.type]}" for item in _schema(bundle.manifest.classes))


def t2(bundle: Bundle, *, hosts: Collection[str] | None = None, runtime: str = "auto") -> Any:
    """Return a pandas UDF in the form of Fink's science modules: it takes columns and returns a struct with the
    result's columns.

    Its arguments are candid, cjd, cfid, cmagpsf, csigmapsf, as Fink's `concat_col` makes them (history first, the
    alert's own measurement last). They do not say which detections are negative. With `cisdiffpos` as a sixth column
    the numbers are those of `edgekit alerts classify`; without it every detection counts as positive, as in Fink's
    modules.

    hosts: if it is given, the columns after the fifth are roid, cdsxmatch and jdstarthist (and cisdiffpos is the
    ninth), and the function classifies only alerts inside Fink's cuts, whose cdsxmatch is one of these names.
    fink-utils returns the names as `return_list_of_eg_host()`.
    """
    return _pandas_udf(_columns_function(bundle, hosts, runtime), result_ddl(bundle))


def t2_max_prob(bundle: Bundle, *, hosts: Collection[str] | None = None, runtime: str = "auto") -> Any:
    """Return `t2` with the most probable class as its only result, "None" for an alert without a class: Fink's
    `t2_max_prob`."""
    function = _columns_function(bundle, hosts, runtime)

    def best(*columns: pd.Series) -> pd.Series:
        return function(*columns)["best_class"].fillna(NONE).astype(object)

    return _pandas_udf(best, "string")


def _pandas_udf(function: Callable[..., Any], returns: str) -> Any:
    try:
        import pandas as pd
        from pyspark.sql.functions import pandas_udf
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name), "spark", "a pandas UDF") from None

    def run(*columns: Any) -> Any:
        return function(*columns)

    # Spark looks at the types to tell the form of the UDF, so these are types and not their names
    run.__annotations__ = {"columns": pd.Series, "return": pd.Series if returns == "string" else pd.DataFrame}
    return pandas_udf(run, returns)


def _columns_function(bundle: Bundle, hosts: Collection[str] | None, runtime: str) -> Callable[..., pd.DataFrame]:
    job, names = _job(bundle, None, (), runtime), ["candid", "cjd", "cfid", "cmagpsf", "csigmapsf"]
    names += [] if hosts is None else ["roid", "cdsxmatch", "jdstarthist"]

    def run(*columns: pd.Series) -> pd.DataFrame:
        if len(columns) not in (len(names), len(names) + 1):
            expected = f"{', '.join(names)} and optionally cisdiffpos"
            raise EdgekitError(f"t2 was given {len(columns)} columns; expected {expected}")
        named = dict(zip([*names, "cisdiffpos"], columns, strict=False))
        rows = _ztf_rows(named)
        inside = np.ones(rows.num_rows, np.bool_) if hosts is None else _inside_cuts(named, hosts)
        table = pa.Table.from_batches([job(rows.filter(pa.array(inside)))])
        table = table.take(pa.array(np.cumsum(inside) - 1, mask=~inside))  # a row outside the cuts becomes null
        status = table["status"].fill_null("skipped: the alert is outside the cuts")
        table = table.set_column(table.schema.get_field_index("status"), "status", status)
        table = table.set_column(table.schema.get_field_index("alert_id"), "alert_id", rows["candid"])
        # integers stay integers, because ids have 64 bits and floats do not
        frame: pd.DataFrame = table.to_pandas(integer_object_nulls=True)
        return frame

    return run


def _ztf_rows(named: dict[str, pd.Series]) -> pa.RecordBatch:
    """Return Fink's concatenated columns as the fields of ZTF's packets. The last measurement is the alert's own."""
    series = {name: named[name] for name in ("cjd", "cfid", "cmagpsf", "csigmapsf", "cisdiffpos") if name in named}
    counts = {name: [0 if values is None else len(values) for values in column] for name, column in series.items()}
    if any(count != counts["cjd"] for count in counts.values()):
        raise EdgekitError(f"{', '.join(series)} differ in length within a row; expected a value for each measurement")
    lengths = np.array(counts["cjd"], np.int64)
    ends, some = np.cumsum(lengths), lengths > 0
    flat = {name[1:]: _flat(column) for name, column in series.items()}
    if "cisdiffpos" not in series:
        flat["isdiffpos"] = repeat("t", int(lengths.sum()))
    points = pa.StructArray.from_arrays(list(flat.values()), names=list(flat))
    history = np.ones(len(points), np.bool_)
    history[ends[some] - 1] = False
    offsets = np.concatenate([[0], np.cumsum(lengths - some)]).astype(np.int32)
    candid = pa.array(named["candid"], pa.int64(), from_pandas=True)
    columns = {
        "objectId": candid.cast(pa.string()).fill_null("unknown"),
        "candid": candid,
        "candidate": points.take(pa.array(ends - 1, mask=~some)),
        "prv_candidates": pa.ListArray.from_arrays(offsets, points.filter(pa.array(history))),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def _flat(column: pd.Series) -> pa.Array:
    """Return the values of all rows, joined. pandas writes null as NaN."""
    arrays = [np.asarray(values) for values in column if values is not None and len(values)]
    return pa.array(np.concatenate(arrays) if arrays else np.empty(0), from_pandas=True)


def _inside_cuts(named: dict[str, pd.Series], hosts: Collection[str]) -> npt.NDArray[np.bool_]:
    known = frozenset(hosts)
    rows = zip(*(named[name] for name in ("cjd", "cmagpsf", "roid", "cdsxmatch", "jdstarthist")), strict=True)
    return np.array(
        [
            jd is not None
            and np.isfinite(np.asarray(magnitude, np.float64)).sum() >= MIN_POINTS
            and jd[-1] - start <= MAX_DAYS
            and roid != MOVING
            and match in known
            for jd, magnitude, roid, match, start in rows
        ],
        np.bool_,
    )


def _job(bundle: Bundle, packets: str | None, keep: Sequence[str], runtime: str) -> SparkJob:
    # an unusable model is reported here, and not in a worker's traceback
    Classifier(bundle, runtime, session_threads=1)
    return SparkJob(bundle.digest, pack(bundle), packets, tuple(keep), runtime)


@functools.lru_cache(maxsize=4)
def _open(digest: str, packed: bytes, runtime: str) -> Classifier:
    return Classifier(unpack(packed, f"the model {digest[:12]}"), runtime, threads=1, session_threads=1)


def _schema(classes: Sequence[str]) -> pa.Schema:
    return pa.schema([item for item in result_schema(classes) if item.name not in LEFT_OUT])


def _survey(columns: Sequence[str]) -> Survey:
    """Return the survey of a table with these leaf columns."""
    found = survey_of(columns)
    if found is None:
        named = ", ".join(dict.fromkeys(name.partition(".")[0] for name in columns))
        raise EdgekitError(
            f"no survey has these columns: {named}; supported: {', '.join(surveys())}. "
            "If a binary column holds packets, name it: packets=..."
        )
    return found


def _fields(rows: DataFrame) -> dict[str, Any]:
    """Return the survey's fields as columns. Records are reduced to the fields that are read before they go to
    Python."""
    from pyspark.sql import functions
    from pyspark.sql.types import ArrayType, StructType

    def names_of(dtype: Any, name: str) -> Iterator[str]:
        if isinstance(dtype, ArrayType):
            yield from names_of(dtype.elementType, name)
        elif isinstance(dtype, StructType):
            yield from (leaf for item in dtype for leaf in names_of(item.dataType, f"{name}{name and '.'}{item.name}"))
        else:
            yield name

    def cut_to(names: Sequence[str]) -> Callable[[Any], Any]:
        return lambda record: functions.when(
            record.isNotNull(), functions.struct(*(record[name].alias(name) for name in names))
        )

    survey = _survey(list(names_of(rows.schema, "")))
    chosen = {}
    for top, inner in survey.fields.items():
        if top not in rows.columns:
            continue
        dtype, column = rows.schema[top].dataType, functions.col(top)
        record = dtype.elementType if isinstance(dtype, ArrayType) else dtype
        if isinstance(record, StructType) and inner:
            cut = cut_to([name for name in inner if name in record.names])
            column = functions.transform(column, cut) if isinstance(dtype, ArrayType) else cut(column)
        chosen[top] = column.alias(top)
    return chosen
