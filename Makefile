# Everything runs in .venv, which `make venv` makes from requirements.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv dev test check demo board

venv: .venv/installed
dev: .venv/installed-dev

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

test: dev
	$(BIN)/python -m pytest

check: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

# A teacher, a student distilled from it, and the student's accuracy: minutes on two cores, on real images that scikit-learn ships.
demo: venv
	$(BIN)/python main.py --config recipes/demo_teacher.yaml --output_dir checkpoints/demo/teacher --overwrite
	$(BIN)/python main.py --config recipes/demo.yaml --output_dir checkpoints/demo/student --overwrite
	$(BIN)/python main.py --config recipes/demo.yaml --eval --resume checkpoints/demo/student/checkpoint_best.pth
	@echo "log:         checkpoints/demo/student/log.txt"
	@echo "checkpoints: checkpoints/demo/student/checkpoint_best.pth (EMA: checkpoint_best_ema.pth)"
	@echo "teacher:     checkpoints/demo/teacher/checkpoint_best.pth"

# Curves of running and finished jobs in a browser; DIR=... looks elsewhere than in checkpoints/.
board: venv
	$(BIN)/tensorboard --logdir $(or $(DIR),checkpoints)
