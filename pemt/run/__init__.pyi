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
from .results import checkpoint_line as checkpoint_line, split_line as split_line
from .train import run_adapt as run_adapt, run_source as run_source
