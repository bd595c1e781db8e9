"""The stages of ``bench gpu`` in their order: what matters most first, what may hang last."""

from __future__ import annotations

from torchlinop.bench import cross_entropy_stage, eigsh_stage, product_stage
from torchlinop.bench.product_stage import compiled_entries, eager_entries
from torchlinop.bench.stages import Stage

PRODUCTS, COMPILED = "products", "compiled products"

# Weights are about the seconds of a run of eight minutes.
_STAGES = [
    product_stage.stage(PRODUCTS, "mlp", 20, eager_entries),
    product_stage.stage(PRODUCTS, "resnet18", 25, eager_entries),
    product_stage.stage(PRODUCTS, "gpt2", 35, eager_entries),
    product_stage.stage(PRODUCTS, "smollm2", 35, eager_entries),
    cross_entropy_stage.stage(20),
    eigsh_stage.stage("mlp", 20),
    eigsh_stage.stage("resnet18", 45),
    product_stage.stage(COMPILED, "mlp", 35, compiled_entries),
    product_stage.stage(COMPILED, "resnet18", 45, compiled_entries),
    product_stage.stage(COMPILED, "gpt2", 45, compiled_entries),
    product_stage.stage(COMPILED, "smollm2", 45, compiled_entries),
]
STAGES: dict[str, Stage] = {stage.name: stage for stage in _STAGES}

TESTS = "tests"  # a process of pytest's own, not a stage
TESTS_WEIGHT = 150.0
