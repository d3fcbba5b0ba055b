import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gendiff.data import files, sumo, traffic
from gendiff.data.traffic import Cut, Recipe
from gendiff.oracles import drivable

shapely = pytest.importorskip("shapely")

ROAD = shapely.box(-300, -6, 300, 6)
"""Along x, 12 m wide."""


def vehicle(x, y, yaw=0.0, speed=3.0, length=4.0):
    return [x, y, length, 2.0, np.cos(yaw), np.sin(yaw), speed]


def world(*vehicles, focus=None, road=ROAD):
    return sumo.World(road, focus, [sumo.Moment(5.0, np.array(vehicles, float).reshape(-1, 7))])


def queue(n, gap=6.0):
    return [vehicle(gap * i - gap * n / 2, 0) for i in range(n)]


def test_a_scene_is_the_nearest_twelve_in_the_frame_of_its_window():
    scenes = traffic.cut(world(*queue(16), focus=(0.0, 0.0)), number=3, seed=0, how=Cut(near=0.0))
    assert scenes.vehicles.shape == (1, 12, 7)
    assert scenes.present.all()
    assert scenes.world.tolist() == [3]
    assert abs(scenes.vehicles[0, :, 0]).max() == 36  # of -48 .. 42 the twelve nearest to 0
    np.testing.assert_allclose(scenes.vehicles[0, :, 2:], np.tile(vehicle(0, 0)[2:], (12, 1)), atol=1e-6)


@pytest.mark.parametrize("turn", [0.3, 2.0, -1.1])
def test_windows_are_turned_with_their_map(turn):
    cos, sin = np.cos(turn), np.sin(turn)
    rotate = lambda p: np.stack([cos * p[..., 0] - sin * p[..., 1], sin * p[..., 0] + cos * p[..., 1]], -1)
    cars = [vehicle(*rotate(np.array([6.0 * i - 36, 1.0])), turn) for i in range(12)]
    road = shapely.transform(ROAD, rotate)
    scenes = traffic.cut(world(*cars, focus=(0.0, 0.0), road=road), 0, 0, Cut(near=0.0))
    np.testing.assert_allclose(np.sort(scenes.vehicles[0, :, 0]), 6.0 * np.arange(12) - 36, atol=1e-4)
    np.testing.assert_allclose(scenes.vehicles[0, :, 1], 1, atol=1e-4)
    np.testing.assert_allclose(scenes.vehicles[0, :, 4:6], np.tile([1, 0], (12, 1)), atol=1e-6)
    np.testing.assert_allclose(scenes.window[0], [0, 0, turn], atol=1e-6)


def test_distances_are_those_to_the_area():
    area = shapely.union_all([shapely.box(-80, -4, 80, 4), shapely.Point(10, 5).buffer(12)])
    window = np.array([[3.0, -2.0, 0.7], [400.0, 300.0, 0.0]])  # the second far from all that is drivable
    given = traffic.distances(area, window, cells=64).astype(float)
    place = (np.arange(64) + 0.5) / 64 * 100 - 50
    y, x = np.meshgrid(place, place, indexing="ij")
    cos, sin = np.cos(0.7), np.sin(0.7)
    points = shapely.points(3 + cos * x - sin * y, -2 + sin * x + cos * y)
    expected = np.where(shapely.contains(area, points), -1, 1) * shapely.distance(area.boundary, points)
    # A cell of the fine grid askew, and the precision of 16 bits.
    np.testing.assert_allclose(given[0], expected.clip(-traffic.REACH, traffic.REACH), atol=0.25)
    assert np.abs(given[0] - expected.clip(-traffic.REACH, traffic.REACH)).mean() < 0.06
    assert (given[1] == traffic.REACH).all()


def test_a_scene_keeps_what_the_oracle_reads():
    scenes = traffic.cut(world(*queue(12), focus=(0.0, 0.0)), 0, 0, Cut(near=0.0))
    at = lambda x, y: float(drivable.distance_at(scenes.distance[0].astype(np.float32), np.float32([[x, y]]), 50.0)[0])
    assert at(0, 0) == pytest.approx(-6, abs=0.5)  # the middle, between two cells
    assert at(10, 5) == pytest.approx(-1, abs=0.13)
    assert at(-20, -9) == pytest.approx(3, abs=0.13)


@pytest.mark.parametrize("what", ["overlap", "off the road"])
def test_scenes_with_infractions_are_left_out(what):
    cars = queue(12)
    cars[5] = vehicle(cars[6][0] + 1, 0) if what == "overlap" else vehicle(0, 5.5)
    assert len(traffic.cut(world(*cars, focus=(0.0, 0.0)), 0, 0, Cut(near=0.0)).world) == 0


def test_few_vehicles_are_padded():
    assert len(traffic.cut(world(*queue(3)), 0, 0).world) == 0
    scenes = traffic.cut(world(*queue(3)), 0, 0, Cut(least=1))
    assert scenes.present.tolist() == [[True] * 3 + [False] * 9]
    assert not scenes.vehicles[0, 3:].any()


def test_windows_of_one_moment_do_not_share_vehicles():
    cars = [vehicle(50.0 * block + 5 * i, 0) for block in range(-4, 4) for i in range(5)]
    scenes = traffic.cut(world(*cars), 0, 0, Cut(least=2, near=1.0))
    assert len(scenes.world) > 1
    cos, sin = np.cos(scenes.window[:, 2:]), np.sin(scenes.window[:, 2:])
    x, y = scenes.vehicles[..., 0], scenes.vehicles[..., 1]
    places = (scenes.window[:, :1] + cos * x - sin * y)[scenes.present].round(2)
    assert len(set(places.tolist())) == len(places)


def test_a_map_without_drivable_area_is_an_error():
    with pytest.raises(ValueError, match="map 7 must have a drivable area"):
        traffic.cut(world(*queue(12), road=shapely.Polygon()), 7, 0)


def test_maps_are_split_and_not_scenes():
    assert [traffic.split_of(i) for i in range(10)] == ["train"] * 8 + ["validation", "test"]
    assert traffic.split_of(29) == "test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for name in ("libsumo", "sumolib", "sumo"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("scenes")
    traffic.write(folder, 40, RECIPE, workers=2)
    return folder


RECIPE = Recipe(seconds=420.0, least_scenes=5)


def test_generated_scenes_are_valid_and_go_on_after_a_kill(folder):
    scenes = traffic.read(folder, scenes=40)
    assert traffic.valid(scenes).all()
    assert scenes.present.all()
    assert (np.abs(np.linalg.norm(scenes.vehicles[..., 4:6], axis=-1) - 1) < 1e-5).all()
    maps = sorted(folder.glob("map-*.npz"))
    maps[0].unlink()  # as if killed before it
    seen = []
    assert traffic.write(folder, 40, RECIPE, workers=1, report=seen.append) >= 1
    again = traffic.read(folder, scenes=40)
    jax.tree.map(np.testing.assert_array_equal, scenes, again)
    assert seen[-1] >= 40


def simulating(folder, *words):
    """The command, in a session of its own, once its worker simulates; and the worker's number."""
    command = [sys.executable, "-m", "gendiff.data.traffic", str(folder), "--scenes", "40", "--workers", "1", *words]
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": root}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 120
    while not list(folder.glob(f".simulating-*-{process.pid}/*/j.rou.xml")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    (worker,) = session(process, "spawn_main")
    return process, worker


def session(process, text=""):
    """The living processes of a command's session, with this text in their command lines."""
    listed = subprocess.run(
        ["ps", "-ww", "-A", "-o", "pid=,sess=,stat=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(maxsplit=3) for line in listed.stdout.splitlines()]
    living = [row for row in rows if row[1] == str(process.pid) and row[2][0] != "Z" and text in row[3]]
    return [int(row[0]) for row in living]


def nobody_is_left(process):
    end = time.monotonic() + 20
    while session(process):
        assert time.monotonic() < end, "its workers live on"
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux's ps")
def test_workers_end_with_their_command_and_leave_nothing(tmp_path):
    for name in ("libsumo", "sumolib", "sumo"):
        pytest.importorskip(name)
    process, _ = simulating(tmp_path)
    process.kill()
    process.wait()
    nobody_is_left(process)
    process, _ = simulating(tmp_path)
    assert len(list(tmp_path.glob(".simulating-*"))) == 1, "that of the killed one is gone"
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert said.splitlines()[-1].startswith("stopped by a notice (SIGTERM): every map that was finished is stored")
    assert "Traceback" not in said
    nobody_is_left(process)
    assert not list(tmp_path.glob(".simulating-*"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux's ps")
def test_a_worker_that_is_killed_is_an_error_and_ctrl_c_is_none(tmp_path):
    for name in ("libsumo", "sumolib", "sumo"):
        pytest.importorskip(name)
    process, worker = simulating(tmp_path)
    os.kill(worker, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "traffic: a worker was killed, perhaps because memory ran out: take fewer workers than 1" in said
    process, _ = simulating(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("stopped by Ctrl-C (SIGINT): every map that was finished is stored")
    assert not list(tmp_path.glob(".simulating-*"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "traffic: seed must be >= 0 and whole, got -1"),
        ({"seconds": float("nan")}, "traffic: seconds must be > 0 and <= 1e\\+06, got nan"),
        ({"seconds": 0.0}, "traffic: seconds must be > 0"),
        ({"least_scenes": -1}, "traffic: least_scenes must be >= 0 and whole, got -1"),
    ],
)
def test_a_recipe_out_of_range_is_refused_before_anything_is_written(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        traffic.write(tmp_path, 10, RECIPE._replace(**wrong))
    with pytest.raises(ValueError, match="traffic: workers must be >= 1 and whole, got 0"):
        traffic.write(tmp_path, 10, RECIPE, workers=0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_scenes_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"got .*: name another folder"):
        traffic.write(folder, 10, RECIPE._replace(seed=1))
    with pytest.raises(ValueError, match=r"map-000000\.npz \.\., got none"):
        traffic.read(tmp_path)
    with pytest.raises(ValueError, match="must hold 100000 scenes"):
        traffic.read(folder, scenes=100_000)
    with pytest.raises(ValueError, match="scenes must be >= 1 and whole, got 0"):
        traffic.write(tmp_path, 0)
    (tmp_path / "map-000000.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="damaged"):
        traffic.read(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
@pytest.mark.parametrize("name", ["map-000000.npz", "recipe.json"])
def test_what_is_no_file_is_told_at_once(kind, name, tmp_path):
    path = tmp_path / name
    {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda path: path.symlink_to(path)}[kind](path)
    read = traffic.recipe_of if name == "recipe.json" else traffic.read
    if (kind, name) == ("loop", "recipe.json"):
        assert traffic.recipe_of(tmp_path) is None  # as if it were not there
    else:
        with pytest.raises(ValueError, match="must be a file, got"):
            read(tmp_path)


SCENES = traffic.take(traffic.embedded(), slice(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: traffic.empty(Cut(cells=0)), "cells must be >= 1 and whole, got 0"),
        (lambda: traffic.empty(Cut(half=np.nan)), "half must be > 0, got nan"),
        (lambda: traffic.valid(SCENES, Cut(half=-1.0)), "half must be > 0, got -1.0"),
        (lambda: traffic.valid(SCENES, Cut(tolerance=np.nan)), "tolerance must be a finite number, got nan"),
        (lambda: traffic.valid(SCENES._replace(present=SCENES.present[:2])), "must be arrays with one number of rows"),
        (lambda: traffic.windows(None, 0, -1), "seed must be >= 0"),
        (lambda: traffic.windows(None, 0, 0, Cut(least=9, most=8)), "most must be >= 9 and whole, got 8"),
        (lambda: traffic.spread(SCENES, 0), "most must be >= 1"),
        (lambda: traffic.read(None, scenes=-1), "scenes must be >= 1 and whole, got -1"),
        (lambda: traffic.of_split(SCENES, "val"), "split must be 'train' or 'validation' or 'test', got 'val'"),
        (lambda: traffic.halved(np.zeros((1, 3, 4))), r"distance must have shape \(n, 2, 4\), got \(1, 3, 4\)"),
        (lambda: sumo.simulate("crossing", 0), "kind must be 'junction' or"),
        (lambda: sumo.simulate("junction", -1), "seed must be >= 0"),
        (lambda: sumo.simulate("junction", 0, every=0.0), "every must be >= 0.5, got 0.0"),
        (lambda: sumo.simulate("junction", 0, seconds=np.nan), "seconds must be > 0, got nan"),
    ],
)
def test_arguments_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_split_without_scenes_is_told(tmp_path):
    for number in range(2):
        files.store(traffic._file(tmp_path, number), lambda file: np.savez_compressed(file, **SCENES._asdict()))
    with pytest.raises(ValueError, match="maps of test must have scenes, got none; 2 maps are too few"):
        traffic.read(tmp_path, "test")


def test_maps_that_are_left_out_one_after_the_other_are_an_error(tmp_path, monkeypatch):
    """Simulations that end before the first scene would go on for ever."""
    monkeypatch.setattr(traffic, "BARREN", 3)
    none = traffic.empty(Cut())._asdict()
    for number in range(3):
        files.store(traffic._file(tmp_path, number), lambda file: np.savez_compressed(file, **none))
    with pytest.raises(ValueError, match="16 scenes or more in 200 s, got 3 in a row with fewer: simulate longer"):
        traffic.write(tmp_path, 1, Recipe(seconds=200.0))
    assert traffic.recipe_of(tmp_path) == Recipe(seconds=200.0)
    assert traffic.recipe_of(tmp_path / "none") is None
    (tmp_path / traffic.RECIPE).write_text('{"seed": 0}')
    with pytest.raises(ValueError, match=r"recipe\.json must hold a recipe of scenes, got a damaged file"):
        traffic.recipe_of(tmp_path)


def test_without_sumo_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(sumo.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("SUMO_HOME", raising=False)
    with pytest.raises(sumo.SumoError, match=r"pip install 'gendiff\[traffic\]'"):
        sumo.simulate("junction", 0)
