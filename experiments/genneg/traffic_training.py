"""Gen-neG on scenes of traffic: how its networks are trained, and the programs for `tpu.plan`."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.genneg import programs as plan
from experiments.genneg.traffic_problem import Purpose, TrafficConfig, classifier_network, denoiser_network, problem
from experiments.lab.config import ConfigError, replaced
from experiments.lab.phases import Run
from experiments.lab.programs import KEY, Lower, Program, abstract, first, many, of, placed, planned, trained
from gendiff import distributed, nets, training
from gendiff.data import scenes
from gendiff.data import traffic as data
from gendiff.data.scenes import Sets
from gendiff.methods import genneg
from gendiff.nets.scene_transformer import Place


def base_training(run: Run) -> training.Training:
    """The training of theta: denoising score matching, stopped by the loss on validation maps."""
    config, sets = run.config, run.data
    examples = {name: (sets.places[name], sets.x[name]) for name in ("train", "validation")}
    count = len(sets.x["validation"])
    held_out = data.take(examples["validation"], scenes.evenly(min(512, count), count))
    keys = jax.random.split(run.key(Purpose.VALIDATION), len(held_out[1]))
    theta = nets.fresh(denoiser_network(config), run.key(Purpose.START), data.take(sets.places["test"], 0))
    task = genneg.base_task(problem(config), config.baseline.batch, scenes.changed(config.fewer, config.quarters))
    settings = config.baseline.settings(0.999, 250, 500)
    context = (None if config.stream else examples["train"], held_out, keys)
    batches = streamed(examples["train"], config) if config.stream else None
    return training.Training(run.key(Purpose.BASELINE), theta, task, context, settings, data=batches)


def streamed(examples: Any, config: TrafficConfig) -> Any:
    """Batches of training scenes from the host; a process reads only its own rows.

    Raises:
      ConfigError: Grain is not installed, or the processes do not divide the batch.
    """
    try:
        from gendiff.data import stream  # seconds of import

        change = partial(data.take, examples)
        return stream.batches(range(len(examples[1])), config.baseline.batch, config.seed, change=change)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"--stream: {error}") from None


def student_training(config: TrafficConfig) -> genneg.StudentTraining:
    return genneg.StudentTraining(config.student.settings(0.998, 250, 100), config.student.batch)


def classifier_training(
    config: TrafficConfig, weighting: Literal["importance", "none"] = "importance"
) -> genneg.ClassifierTraining:
    settings = config.classifier.settings(0.998, 250, 100)
    return genneg.ClassifierTraining(settings, config.classifier.batch // 2, weighting, validation=256)


# For `tpu.plan`.


def programs(config: TrafficConfig) -> dict[str, Program]:
    """The programs that take most of the time."""
    setup, sets, n = problem(config), sets_of(config), 3 * config.draws.per_class

    def baseline(batch: int) -> training.Training:
        sized = replaced(config, {"baseline.batch": batch})
        return abstract(lambda sets: base_training(planned(sized, sets)), sets)

    place = first(sets.conditions)
    new = lambda key: nets.fresh(classifier_network(config, "agent"), key, jax.tree.map(jnp.zeros_like, place))
    samples = {
        "x": np.zeros((n, *setup.shape), np.float32),
        "row": np.zeros(n, np.int32),
        "labels": np.zeros((n, data.VEHICLES), bool),
    }
    conditions = lambda n: many(place, n)
    settings = classifier_training(config)
    model = plan.stack(baseline(config.baseline.batch).params, jax.eval_shape(new, KEY), 2)
    title, encoding = "ancestral, guided by 2 classifiers", maps(setup, model, conditions)
    return {
        "base": trained("baseline", "scenes", config.baseline.batch, baseline, pool=True),
        "classifier": plan.classifier(
            "a classifier by vehicle", "scenes", setup, settings, new, samples, sets.conditions
        ),
        "sampler": plan.guided(title, setup, config.draws.batch, model, conditions, encoding),
    }


def sets_of(config: TrafficConfig) -> Sets:
    """The shapes of the scenes: of ten maps eight are for training, one for validation and one for tests."""
    place: Any = Place(of((data.CELLS, data.CELLS), jnp.float16), of((data.VEHICLES,), bool))  # type: ignore[arg-type]
    counts = {"train": config.scenes * 8 // 10, "validation": config.scenes // 10, "test": config.scenes // 10}
    places = {name: many(place, count) for name, count in counts.items()}
    x: Any = {name: of((count, data.VEHICLES, 7)) for name, count in counts.items()}
    return Sets({}, places, x, places["train"])


def maps(setup: genneg.OracleProblem, model: genneg.Guided, conditions: Callable[[int], Place]) -> Lower:
    """Lower the encoding of a batch's maps, which a sampler does before its loop."""

    def of_place(model: genneg.Guided, place: Place) -> Any:
        bound = genneg.bound(setup, model, place)
        return bound.theta["memory"], bound.classifiers["net"]["memory"]

    def lower(mesh: jax.sharding.Mesh, n: int) -> Any:
        def encoded(model: genneg.Guided, places: Place) -> Any:
            return distributed.chunked(partial(of_place, model), places, setup.chunk, mesh, cut=False)

        return jax.jit(encoded).lower(*placed((model, conditions(n)), distributed.replicated(mesh)))

    return lower
