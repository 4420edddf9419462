.PHONY: fmt lint test bench gpu smoke wheel

fmt:
	ruff format fastood tests bench examples
	ruff check --fix fastood tests bench examples

lint:
	ruff format --check fastood tests bench examples
	ruff check fastood tests bench examples
	mypy

test:
	pytest

bench:
	pytest bench --benchmark-only

gpu:
	bench/gpu.sh

smoke:
	FASTOOD_BENCH_SMOKE=1 pytest bench --benchmark-only --benchmark-max-time=0.05 \
		--benchmark-min-rounds=1 --benchmark-json=.benchmarks/smoke.json -q
	python -m bench.report .benchmarks/smoke.json --out .benchmarks/smoke
	FASTOOD_BENCH_SMOKE=1 python -m bench.setar

wheel:
	pip wheel --no-deps -w dist .
