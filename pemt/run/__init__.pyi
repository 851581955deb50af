from .build import build_ops as build_ops
from .early import (
    check_early as check_early,
    check_inputs as check_inputs,
    check_method as check_method,
)
from .evaluate_finished import evaluate_run as evaluate_run
from .fetch import FETCHED as FETCHED, fetch_all as fetch_all
from .finished import LoadedRun as LoadedRun, load_finished as load_finished
from .finished_config import check_finished as check_finished
from .outcome import RunResults as RunResults, SourceResults as SourceResults
from .predict import Predictor as Predictor, predict_file as predict_file
from .results import chosen_text as chosen_text, scored_text as scored_text
from .train import run_adapt as run_adapt, run_source as run_source
