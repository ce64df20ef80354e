# Everything runs in .venv, which `make venv` makes from requirements.txt. Words after ## are what `make help` prints.
PYTHON ?= python3
BIN := .venv/bin
AT_HAND := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.DEFAULT_GOAL := help
.PHONY: help venv dev test check demo detection-demo segmentation-demo board gpu gpu-report

help:  ## print this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "make %-17s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: .venv/installed  ## make .venv with what training needs
dev: .venv/installed-dev  ## add what tests, exports and plots need

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed $(wildcard requirements-*.txt)
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	$(BIN)/python -m pip install -q --no-deps imagecorruptions-imaug
	touch $@

test: dev  ## run the test suite
	$(BIN)/python -m pytest

check: dev  ## check format and lint, then run the test suite
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

demo: venv  ## train a teacher on real digits, distil a student from it, evaluate it: minutes on two cores
	$(BIN)/python main.py --config recipes/demo_teacher.yaml --output_dir checkpoints/demo/teacher --overwrite
	$(BIN)/python main.py --config recipes/demo.yaml --output_dir checkpoints/demo/student --overwrite
	$(BIN)/python main.py --config recipes/demo.yaml --eval --resume checkpoints/demo/student/checkpoint_best.pth
	@echo "log:         checkpoints/demo/student/log.txt"
	@echo "checkpoints: checkpoints/demo/student/checkpoint_best.pth (EMA: checkpoint_best_ema.pth)"
	@echo "teacher:     checkpoints/demo/teacher/checkpoint_best.pth"

detection-demo: venv  ## train a small Mask R-CNN on made images of shapes, evaluate it, draw what it finds: ten minutes on two cores
	$(BIN)/python -m pip install -q -r requirements-detection.txt
	$(BIN)/python tools/make_shapes.py --out data/shapes
	$(BIN)/python -m detection --config recipes/detection/demo.yaml --output_dir checkpoints/shapes --overwrite
	$(BIN)/python -m detection --config recipes/detection/demo.yaml --eval --resume checkpoints/shapes/checkpoint_best.pth
	$(BIN)/python predict.py data/shapes/val2017 --resume checkpoints/shapes/checkpoint_best.pth --csv checkpoints/shapes/seen.csv --out checkpoints/shapes/seen
	@echo "logs:       checkpoints/shapes/log.txt and train_log.txt"
	@echo "checkpoint: checkpoints/shapes/checkpoint_best.pth"
	@echo "overlays:   checkpoints/shapes/seen"

segmentation-demo: venv  ## train a small Semantic FPN on the same shapes, evaluate it, paint what it sees: minutes on two cores
	$(BIN)/python tools/make_shapes.py --out data/shapes --semantic
	$(BIN)/python -m segmentation --config recipes/segmentation/demo.yaml --output_dir checkpoints/shapes_fpn --overwrite
	$(BIN)/python -m segmentation --config recipes/segmentation/demo.yaml --eval --resume checkpoints/shapes_fpn/checkpoint_best.pth
	$(BIN)/python predict.py data/shapes/images/validation --resume checkpoints/shapes_fpn/checkpoint_best.pth --csv checkpoints/shapes_fpn/seen.csv --out checkpoints/shapes_fpn/seen
	@echo "logs:       checkpoints/shapes_fpn/log.txt and train_log.txt"
	@echo "checkpoint: checkpoints/shapes_fpn/checkpoint_best.pth"
	@echo "overlays:   checkpoints/shapes_fpn/seen"

board: venv  ## curves of running and finished jobs in a browser; DIR=... looks elsewhere than in checkpoints/
	$(BIN)/tensorboard --logdir $(or $(DIR),checkpoints)

gpu:  ## check and measure what needs a GPU, in ten minutes: gpu.jsonl; installs nothing, takes PYTHON where there is no .venv
	$(AT_HAND) benchmarks/gpu.py --out gpu.jsonl

gpu-report:  ## gpu.jsonl as tables in benchmarks/RESULTS.md
	$(AT_HAND) benchmarks/gpu_report.py gpu.jsonl
