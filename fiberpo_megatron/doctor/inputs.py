"""These checks look at what the config names: the model's files, its tokenizer, its layout, and the prompts."""

from fiberpo_megatron.config import Config
from fiberpo_megatron.doctor.report import Finding
from fiberpo_megatron.printable import printable


def model_files(config: Config) -> list[Finding]:
    """Check that config.json exists and that every safetensors file has a readable header that agrees with the
    index."""
    from fiberpo_megatron.mcore.weights.files import stored_tensors

    folder = config.model.path
    fix = "Name a complete Hugging Face folder in model.path; copy what is missing again"
    if not (folder / "config.json").is_file():
        return [Finding("model files", "fail", f"{folder / 'config.json'} does not exist", fix)]
    try:
        files = {stored.file for stored in stored_tensors(folder).values()}
    except (ValueError, FileNotFoundError) as error:
        return [Finding("model files", "fail", str(error), fix)]
    if not files and not config.model.random_init:
        return [Finding("model files", "fail", f"{folder} has no *.safetensors", fix)]
    return [Finding("model files", "pass", f"{folder}: {len(files)} weight files")]


def tokenizer(config: Config) -> list[Finding]:
    """Load the tokenizer and its stop tokens as a run does."""
    from fiberpo_megatron.data.tokenizer import load_tokenizer, stop_token_ids

    try:
        stops = stop_token_ids(config.model.path, load_tokenizer(config.model.path))
    except ValueError as error:
        return [Finding("tokenizer", "fail", str(error), "Copy the model's tokenizer files into model.path")]
    return [Finding("tokenizer", "pass", f"stop tokens {', '.join(map(str, stops))}")]


def layout(config: Config, world_size: int) -> list[Finding]:
    """Check that [parallel] divides the model and the ranks."""
    from fiberpo_megatron.mcore.families import read_architecture, read_hf_config
    from fiberpo_megatron.mcore.parallel.checks import layout_problems

    path = config.model.path / "config.json"
    if not path.is_file():
        return []  # `model_files` says so
    problems = layout_problems(
        read_architecture(read_hf_config(config.model.path, config.model.family)), config.parallel, world_size
    )
    found = []
    for problem in problems:
        what, _, fix = problem.rpartition("; ")
        found.append(Finding("layout", "fail", what or problem, fix))
    return found or [Finding("layout", "pass", f"{world_size} ranks")]


def environments(config: Config) -> list[Finding]:
    """Check that every environment starts in its workers' interpreter and offers tasks."""
    from fiberpo_megatron.environments.host import describe

    found = []
    for environment in config.environments:
        name = f"environment {environment.name}"
        try:
            description = describe(environment)
        except ValueError as error:
            what, _, fix = str(error).rpartition("; ")
            found.append(Finding(name, "fail", what or str(error), fix))
            continue
        seen = f"{description.train_size} training tasks, {description.held_out_size} held-out tasks"
        seen += f"; {printable(description.about)}" if description.about else ""
        found.append(Finding(name, "pass", seen))
    return found
