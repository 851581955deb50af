from .build import check_method as check_method
from .evaluate_finished import evaluate_run as evaluate_run
from .finished import LoadedRun as LoadedRun, load_finished as load_finished
from .predict import predict_file as predict_file
from .train import run_adapt as run_adapt, run_source as run_source
