"""Test equipment that ships, so that extenders can test their own parts."""

from lit_moe.testing.distributed import run_distributed
from lit_moe.testing.families import FAMILIES, FamilyCase
from lit_moe.testing.models import example_inputs, random_plan, tiny_moe

__all__ = ["FAMILIES", "FamilyCase", "example_inputs", "random_plan", "run_distributed", "tiny_moe"]
