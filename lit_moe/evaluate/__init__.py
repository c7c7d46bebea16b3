"""Measures of quality: perplexity on fixed blocks, multiple choice, exact short answers."""

from lit_moe.evaluate.exact_match import ExactMatch as ExactMatch
from lit_moe.evaluate.exact_match import Fact as Fact
from lit_moe.evaluate.exact_match import exact_match as exact_match
from lit_moe.evaluate.exact_match import load_capitals as load_capitals
from lit_moe.evaluate.exact_match import load_facts as load_facts
from lit_moe.evaluate.harness import evaluate_harness as evaluate_harness
from lit_moe.evaluate.multiple_choice import evaluate_multiple_choice as evaluate_multiple_choice
from lit_moe.evaluate.multiple_choice import load_questions as load_questions
from lit_moe.evaluate.perplexity import Perplexity as Perplexity
from lit_moe.evaluate.perplexity import Quality as Quality
from lit_moe.evaluate.perplexity import evaluate_perplexity as evaluate_perplexity
