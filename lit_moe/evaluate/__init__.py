"""Measures of quality: perplexity on fixed blocks, multiple choice, short answers, tasks."""

from lit_moe.evaluate.chat import ChatFormat as ChatFormat
from lit_moe.evaluate.chat import chat_format as chat_format
from lit_moe.evaluate.exact_match import ExactMatch as ExactMatch
from lit_moe.evaluate.exact_match import Fact as Fact
from lit_moe.evaluate.exact_match import exact_match as exact_match
from lit_moe.evaluate.exact_match import load_capitals as load_capitals
from lit_moe.evaluate.exact_match import load_facts as load_facts
from lit_moe.evaluate.generation import GenerationOptions as GenerationOptions
from lit_moe.evaluate.generation import generate_answers as generate_answers
from lit_moe.evaluate.harness import evaluate_harness as evaluate_harness
from lit_moe.evaluate.multiple_choice import evaluate_multiple_choice as evaluate_multiple_choice
from lit_moe.evaluate.multiple_choice import load_questions as load_questions
from lit_moe.evaluate.perplexity import Perplexity as Perplexity
from lit_moe.evaluate.perplexity import Quality as Quality
from lit_moe.evaluate.perplexity import evaluate_perplexity as evaluate_perplexity
from lit_moe.evaluate.prompts import Prompting as Prompting
from lit_moe.evaluate.prompts import PromptTemplate as PromptTemplate
from lit_moe.evaluate.prompts import TaskItem as TaskItem
from lit_moe.evaluate.squad import AnswerScores as AnswerScores
from lit_moe.evaluate.squad import squad_exact_match as squad_exact_match
from lit_moe.evaluate.squad import squad_f1 as squad_f1
from lit_moe.evaluate.squad import squad_normalised as squad_normalised
from lit_moe.evaluate.task_quality import TaskQuality as TaskQuality
from lit_moe.evaluate.task_quality import evaluate_task as evaluate_task
