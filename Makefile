# What the README's commands call. `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help install bench gpu demo demo-dense demo-scenes demo-scenes-dense docs test test-fast torture fuzz interop oldest newest api licences audit lint format types clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed  ## make .venv with this checkout and every extra

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# Everything that pip installs has its version in constraints.txt, what it builds packages with included; pip before 25.3
# takes that from the first variable, later ones from the second.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Two processes of one thread each train twice as fast on two cores as one process of two threads.
demo: install  ## fine-tune sgformer_n on 1,500 photographs of clothes, beside the same from random weights (8 minutes on 2 cores)
	rm -rf demo/clothes
	$(BIN)/sgformer ablate --config examples/demo.yaml --out demo/clothes
	$(BIN)/sgformer eval demo/clothes/runs/pretrained-0 --data examples/photos/clothes --out demo/clothes/eval
	mkdir demo/clothes/photos
	tar -xf examples/photos/clothes/val/000000.tar -C demo/clothes/photos
	$(BIN)/sgformer explain demo/clothes/runs/pretrained-0 demo/clothes/photos --limit 12 --out demo/clothes/explain
	@cat demo/clothes/demo.md
	@echo 'Open demo/clothes/demo-curves.png, demo/clothes/eval, demo/clothes/explain/index.html and demo/clothes/runs/*/report.md.'

demo-scenes: install  ## compose scenes, train sgformer_n on them from random weights, evaluate, show what it looked at (12 minutes)
	rm -rf demo/scenes demo/run demo/eval demo/explain
	$(BIN)/sgformer data scenes demo/scenes --train 10000 --val 1000 --image-size 64 --workers 2
	$(BIN)/sgformer train classify --config recipes/scenes_n.yaml --data demo/scenes --run demo/run --device cpu --devices 2
	$(BIN)/sgformer eval demo/run --data demo/scenes --out demo/eval
	$(BIN)/sgformer explain demo/run demo/scenes/val --limit 12 --out demo/explain
	@echo 'Open demo/run/report.md, demo/run/curves.png, demo/eval and demo/explain/index.html.'

demo-dense: install  ## outline nuclei of cells with Mask R-CNN on 150 microscope images, from the weights that come with the package (12 minutes on 2 cores)
	rm -rf demo/nuclei
	$(BIN)/sgformer train detect --config recipes/detect_n_nuclei.yaml --data examples/photos/nuclei --run demo/nuclei/run --device cpu --devices 2
	$(BIN)/sgformer eval demo/nuclei/run --data examples/photos/nuclei --out demo/nuclei/eval
	$(BIN)/sgformer predict demo/nuclei/run examples/photos/nuclei/val2017 --out demo/nuclei/seen
	$(BIN)/sgformer explain demo/nuclei/run examples/photos/nuclei/val2017 --limit 6 --out demo/nuclei/explain
	@echo 'Open demo/nuclei/run/report.md, demo/nuclei/eval, demo/nuclei/seen and demo/nuclei/explain/index.html.'

# The backbone comes from demo-scenes, which runs first if it has not.
demo/run/best.safetensors:
	$(MAKE) demo-scenes

demo-scenes-dense: demo/run/best.safetensors  ## then detect, outline and segment the digits (20 minutes on 2 cores)
	rm -rf demo/scenes-dense
	$(BIN)/sgformer data scenes demo/scenes-dense/coco --layout coco --train 1600 --val 200 --image-size 128 --workers 2
	$(BIN)/sgformer data scenes demo/scenes-dense/ade20k --layout ade20k --train 2000 --val 200 --image-size 128 --workers 2
	$(BIN)/sgformer train detect --config recipes/detect_n_scenes.yaml --data demo/scenes-dense/coco --weights demo/run --run demo/scenes-dense/detect --device cpu --devices 2
	$(BIN)/sgformer train segment --config recipes/segment_n_scenes.yaml --data demo/scenes-dense/ade20k --weights demo/run --run demo/scenes-dense/segment --device cpu --devices 2
	$(BIN)/sgformer eval demo/scenes-dense/detect --data demo/scenes-dense/coco --out demo/scenes-dense/detect-eval
	$(BIN)/sgformer eval demo/scenes-dense/segment --data demo/scenes-dense/ade20k --out demo/scenes-dense/segment-eval
	$(BIN)/sgformer predict demo/scenes-dense/detect demo/scenes-dense/coco/val2017/00000000000[1-9].jpg --out demo/scenes-dense/detect-seen
	$(BIN)/sgformer predict demo/scenes-dense/segment demo/scenes-dense/ade20k/images/validation/0000000[1-9].jpg --out demo/scenes-dense/segment-seen
	@echo 'Open demo/scenes-dense/detect/report.md, demo/scenes-dense/segment/report.md and the pictures in demo/scenes-dense/*-seen.'

# Two processes of one thread each are quicker on two cores than one process of two.
test: install  ## the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-fast: install  ## the quick part of it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not slow'

bench: install  ## speed and memory, every target beside its figure; refreshes docs/results.md (an hour on 2 quiet cores)
	$(BIN)/python benchmarks/standing.py --out bench

gpu: install  ## on one GPU, in 8 minutes: its tests, then speed beside other networks, and what did not fit; in gpu/
	$(BIN)/python benchmarks/gpu.py --out gpu

docs: install  ## the documentation as a site, in site/; open site/index.html (search needs a server: python3 -m http.server -d site)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

torture: install  ## kill it 100 times, feed it 50,000 bad inputs, and count (30 minutes of a core); counts in torture/
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/torture.py --out torture

fuzz: install  ## fuzzing that looks for new branches, a minute a target (needs atheris, which has wheels for Linux)
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	for target in checkpoint_adapter pickles safetensors_files meanings exports texts coco_files label_maps configs settings shown; do \
	  OMP_NUM_THREADS=1 $(BIN)/python tests/faults/fuzz.py $$target --seconds 60 || exit 1; done

interop:  ## every snippet of docs/interop.md in a fresh environment that has '.[interop]' alone (6 GB while it runs)
	rm -rf .venv-interop
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install --quiet '.[interop]'
	.venv-interop/bin/python -m pip check
	.venv-interop/bin/python docs/snippets.py docs/interop.md
	rm -rf .venv-interop

oldest: .venv-oldest/.installed  ## the quick tests on the oldest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 -m 'not slow'

# The lower bounds as they stand in pyproject.toml; pip has no such mode.
.venv-oldest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest --build-constraints constraints.txt --resolution lowest-direct --editable '.[dev]'
	@touch $@

newest: .venv-newest/.installed  ## the quick tests on the newest versions there are
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 -m 'not slow'

.venv-newest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	PIP_CONSTRAINT= .venv-newest/bin/python -m pip install --quiet --upgrade --editable '.[dev]'
	@touch $@

api: install  ## write the public names and options to tests/api.txt, after changing them on purpose
	$(BIN)/python tests/test_api.py

licences: install  ## write docs/licences.md
	$(BIN)/python docs/licences.py

audit: install  ## secrets in what is tracked; known vulnerabilities of what is installed (needs the network)
	$(BIN)/python -m pip install --quiet pip-audit detect-secrets
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook
	$(BIN)/python -m pip_audit --skip-editable

lint: install  ## formatter and linter, changing nothing
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: install  ## type checker
	$(BIN)/mypy
	MYPYPATH=src:benchmarks $(BIN)/mypy --no-warn-unused-ignores $(foreach code,arg-type assignment index list-item misc operator union-attr var-annotated,--disable-error-code $(code)) benchmarks/*.py

format: install
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf .venv .venv-interop .venv-oldest .venv-newest torture gpu demo site build dist *.egg-info src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
