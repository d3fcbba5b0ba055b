import builtins
import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gendiff.data import DataError, commonroad, traffic
from gendiff.data.traffic import Cut

shapely = pytest.importorskip("shapely")

SAMPLES = Path(os.environ.get("GENDIFF_DATA", "nowhere")) / "commonroad"
ROAD = (-100.0, -6.0, 100.0, 6.0)
HOW = Cut(least=1, near=0.0, cells=32)


# Files by hand.


def lanelet(left, right, more="", name=1):
    bounds = zip(("leftBound", "rightBound"), (left, right), strict=True)
    points = lambda bound: "".join(f"<point><x>{x}</x><y>{y}</y></point>" for x, y in bound)
    return f'<lanelet id="{name}">{"".join(f"<{k}>{points(v)}</{k}>" for k, v in bounds)}{more}</lanelet>'


def straight(low=-100, right=-6, high=100, left=6, more="", name=1):
    """A lanelet along x."""
    return lanelet([(low, left), (high, left)], [(low, right), (high, right)], more, name)


def exact(name, value):
    return f"<{name}><exact>{value}</exact></{name}>"


def interval(name, start, end):
    return f"<{name}><intervalStart>{start}</intervalStart><intervalEnd>{end}</intervalEnd></{name}>"


def point(x, y):
    return f"<point><x>{x}</x><y>{y}</y></point>"


def state(time, x=0.0, y=0.0, yaw=0.0, speed=None, position=None, orientation=None, velocity=None):
    velocity = velocity or ("" if speed is None else exact("velocity", speed))
    orientation = exact("orientation", yaw) if orientation is None else orientation
    return f"<position>{position or point(x, y)}</position>{orientation}{exact('time', time)}{velocity}"


def rectangle(length=4.0, width=2.0, more=""):
    return f"<rectangle><length>{length}</length><width>{width}</width>{more}</rectangle>"


def car(*states, kind="car", shape=None, name=7, tag="dynamicObstacle", role=""):
    first, *others = states
    trajectory = "".join(f"<state>{each}</state>" for each in others)
    return (
        f'<{tag} id="{name}">{role}<type>{kind}</type><shape>{shape or rectangle()}</shape>'
        f"<initialState>{first}</initialState><trajectory>{trajectory}</trajectory></{tag}>"
    )


def commonroad_xml(*parts, version="2020a", seconds="0.5", name="ZAM_Test-1_1_T-1"):
    head = f'commonRoadVersion="{version}" timeStepSize="{seconds}" benchmarkID="{name}"'
    return f"<?xml version='1.0' encoding='UTF-8'?>\n<commonRoad {head}>{''.join(parts)}</commonRoad>"


@pytest.fixture
def world(tmp_path):
    def world(*parts, every=0.5, **how):
        path = tmp_path / "test.xml"
        path.write_text(commonroad_xml(*parts, **how))
        return commonroad.read_world(path, every)

    return world


@pytest.fixture
def one(world):
    """The only vehicle of the only moment."""

    def one(state, **how):
        (moment,) = world(straight(), car(state, **how)).moments
        return moment.vehicles[0].tolist()

    return one


# Vehicles.


def test_a_vehicle_is_its_rectangle_around_its_position(one):
    cos, sin = np.cos(0.3), np.sin(0.3)
    assert one(state(0, 10, 1, 0.3, 5)) == pytest.approx([10, 1, 4, 2, cos, sin, 5])
    assert one(state(0, 10, 1, -2, -1), shape=rectangle(8.5, 2.5), kind="truck") == pytest.approx(
        [10, 1, 8.5, 2.5, np.cos(2), -np.sin(2), -1]
    )


@pytest.mark.parametrize("yaw", [0.0, 0.3, -2.5])
def test_a_shape_may_be_off_its_position(one, yaw):
    cos, sin = np.cos(yaw), np.sin(yaw)
    shifted = one(state(0, 10, 1, yaw, 5), shape=rectangle(more="<originXShift>-1.5</originXShift>"))
    assert shifted == pytest.approx([10 + 1.5 * cos, 1 + 1.5 * sin, 4, 2, cos, sin, 5])  # the position is the rear axle
    more = "<orientation>0.2</orientation><center><x>1</x><y>0.5</y></center>"
    turned = one(state(0, 10, 1, yaw, 5), shape=rectangle(more=more))
    expected = [10 + cos - 0.5 * sin, 1 + sin + 0.5 * cos, 4, 2, np.cos(yaw + 0.2), np.sin(yaw + 0.2), 5]
    assert turned == pytest.approx(expected)


@pytest.mark.parametrize("region", ["rectangle", "circle"])
def test_of_what_is_uncertain_the_middle_counts(one, region):
    position = f"<{region}><center><x>3</x><y>-1</y></center></{region}>"
    uncertain = {"orientation": interval("orientation", 0.1, 0.3), "velocity": interval("velocity", 4, 5)}
    assert one(state(0, position=position, **uncertain)) == pytest.approx([3, -1, 4, 2, np.cos(0.2), np.sin(0.2), 4.5])
    around = interval("orientation", 3.0, -3.0)  # through pi
    assert one(state(0, speed=0, orientation=around))[4:6] == pytest.approx([-1, 0])


def test_missing_speeds_follow_from_the_positions(world):
    ahead = [state(t, 3 * t + t * t, 0) for t in range(4)]
    moments = world(straight(), car(*ahead), seconds="0.1").moments
    # Differences over two steps of 0.1 s, and at both ends over one.
    assert [m.vehicles[0, 6] for m in moments] == pytest.approx([40])
    moments = world(straight(), car(*ahead), seconds="0.1", every=0.1).moments
    assert [m.vehicles[0, 6] for m in moments] == pytest.approx([40, 50, 70, 80])
    back = [state(0, 0, 0, np.pi), state(1, 2, 0, np.pi, speed=1), state(2, 4, 0, np.pi)]
    assert [m.vehicles[0, 6] for m in world(straight(), car(*back)).moments] == pytest.approx([-4, 1, -4])


def test_moments_are_some_seconds_apart_from_the_first_state_on(world):
    long = car(*(state(t, t, 0, speed=1) for t in range(3, 12)), name=7)
    short = car(*(state(t, t, 3, speed=2) for t in range(3, 8)), name=8)
    moments = world(straight(), long, short, every=2.0).moments
    assert [m.seconds for m in moments] == [1.5, 3.5, 5.5]
    assert [m.vehicles[:, :2].tolist() for m in moments] == [[[3, 0], [3, 3]], [[7, 0], [7, 3]], [[11, 0]]]
    gap = world(straight(), car(state(0, speed=1), state(9, 9, speed=1)), every=1.5).moments
    assert [m.seconds for m in gap] == [0, 4.5]
    assert len(world(straight(), long, every=1e-3).moments) == 9  # never less than a step


def test_a_trajectory_may_repeat_the_initial_state(world):
    moments = world(straight(), car(*(state(t, t, 0, speed=1) for t in (4, 4, 5)))).moments
    assert [len(m.vehicles) for m in moments] == [1, 1]


def test_only_vehicles_on_the_move_are_read(world):
    kinds = [*sorted(commonroad.VEHICLES), "bicycle", "pedestrian", "train", "unknown"]
    cars = [car(state(0, 8 * i, speed=1), kind=kind) for i, kind in enumerate(kinds)]
    parked = car(state(0, -20), kind="parkedVehicle", tag="staticObstacle")
    (moment,) = world(straight(), *cars, parked).moments
    assert moment.vehicles[:, 0].tolist() == [8 * i for i in range(len(commonroad.VEHICLES))]


def test_version_2018b_tells_roles(world):
    moving = car(state(0, 1, 2, speed=3), tag="obstacle", role="<role>dynamic</role>")
    still = car(state(0, 9, 2, speed=3), tag="obstacle", role="<role>static</role>")
    (moment,) = world(straight(), moving, still, version="2018b").moments
    assert moment.vehicles.tolist() == [[1, 2, 4, 2, 1, 0, 3]]


# Lanelets.


def test_lanelets_are_joined_without_seams(world):
    area = world(straight(right=0.05), straight(left=-0.05, name=2), car(state(0, speed=1))).drivable
    assert area.symmetric_difference(shapely.box(*ROAD)).area < 0.01
    assert len(area.interiors) == 0


def test_a_lanelet_may_be_pinched_off(world):
    pinched = lanelet([(0, 0), (10, 4)], [(0, 4), (10, 0)])
    assert world(pinched, car(state(0, speed=1))).drivable.area == pytest.approx(20, abs=0.1)


@pytest.mark.parametrize(
    ("more", "drivable"),
    [
        ("<laneletType>urban</laneletType>", True),
        ("<laneletType>urban</laneletType><laneletType>sidewalk</laneletType>", False),
        ("<laneletType>crosswalk</laneletType>", False),
        ("<laneletType>busLane</laneletType><userOneWay>bus</userOneWay>", True),
        ("<userOneWay>vehicle</userOneWay><userBidirectional>pedestrian</userBidirectional>", True),
        ("<userBidirectional>pedestrian</userBidirectional><userBidirectional>bicycle</userBidirectional>", False),
    ],
)
def test_ways_on_foot_and_by_bicycle_are_not_drivable(world, more, drivable):
    area = world(straight(high=0), straight(low=10, more=more, name=2), car(state(0, speed=1))).drivable
    assert area.contains(shapely.Point(50, 0)) == drivable


# Scenes.


def crowd(rotate=lambda x, y: (x, y), turn=0.0):
    """Three vehicles and a lorry on a road with a bend, in 2 moments; by any motion of the plane."""
    place = lambda *xy: rotate(*xy)
    road = lanelet([place(-60, 6), place(5, 6), place(40, 25)], [place(-60, -6), place(5, -6), place(45, 14)], name=1)
    poses = [(-30, 1, 0.1), (-18, -2, 0.0), (-9, 3, 3.1), (20, 8, 0.4)]
    cars = [
        car(
            *(state(t, *place(x + t, y), yaw + turn, speed=i + t) for t in range(2)),
            name=i,
            shape=rectangle(4 + i, more="<originXShift>-1</originXShift>"),
        )
        for i, (x, y, yaw) in enumerate(poses)
    ]
    return commonroad_xml(road, *cars, seconds="2")


@settings(max_examples=5)
@given(turn=st.floats(-3, 3), dx=st.floats(-2000, 2000), dy=st.floats(-2000, 2000))
def test_scenes_do_not_depend_on_the_frame_of_the_map(tmp_path_factory, turn, dx, dy):
    cos, sin = np.cos(turn), np.sin(turn)
    path = tmp_path_factory.mktemp("moved") / "map.xml"
    path.write_text(crowd())
    plain = commonroad.scenes(path, HOW, keep_invalid=True)
    path.write_text(crowd(lambda x, y: (dx + cos * x - sin * y, dy + sin * x + cos * y), turn))
    moved = commonroad.scenes(path, HOW, keep_invalid=True)
    assert plain.present.sum(1).tolist() == [4, 4]
    np.testing.assert_array_equal(moved.present, plain.present)
    np.testing.assert_allclose(moved.vehicles, plain.vehicles, atol=1e-4)
    np.testing.assert_allclose(moved.distance.astype(float), plain.distance.astype(float), atol=0.3)
    x, y, angle = plain.window.T
    np.testing.assert_allclose(moved.window[:, 0], dx + cos * x - sin * y, atol=1e-2)
    np.testing.assert_allclose(moved.window[:, 1], dy + sin * x + cos * y, atol=1e-2)
    np.testing.assert_allclose(np.cos(moved.window[:, 2] - angle - turn), 1, atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    """Two places, one with two files, and a map without vehicles."""
    row = lambda n, gap=6, y=0: [car(state(0, gap * i - 30, y, speed=i), name=i + 10) for i in range(n)]
    (tmp_path / "more").mkdir()
    (tmp_path / "b.xml").write_text(commonroad_xml(straight(), *row(12), name="C-ZAM_Bend-2_1_T-1"))
    (tmp_path / "c.xml").write_text(commonroad_xml(straight(), *row(3), name="ZAM_Bend-1_1_T-1"))
    (tmp_path / "more" / "a.xml").write_text(
        commonroad_xml(straight(), *row(3, gap=2), *row(1, y=5.5), name="ZAM_Arm-1")
    )
    (tmp_path / "map.xml").write_text(commonroad_xml(straight(), name="ZAM_Empty-1"))
    (tmp_path / "README.txt").write_text("no XML")
    return tmp_path


def test_scenes_of_a_folder_are_numbered_by_place(folder):
    full = commonroad.scenes(folder, HOW._replace(least=12), keep_invalid=True)
    assert full.vehicles.shape == (1, 12, 7)
    assert full.present.all()
    assert sorted(full.vehicles[0, :, 6].tolist()) == list(range(12))
    every = commonroad.scenes(folder, HOW, keep_invalid=True)
    # Of ZAM_Arm, ZAM_Bend and ZAM_Empty; of the second there are two files.
    assert every.world.tolist() == [1, 1, 0]
    assert every.present.sum(1).tolist()[1:] == [3, 4]
    alone = commonroad.scenes(folder / "c.xml", HOW, keep_invalid=True)
    assert alone.world.tolist() == [0]
    assert alone.present.sum() == 3
    assert not alone.vehicles[~alone.present].any()


def test_scenes_that_are_not_valid_are_left_out_and_can_be_counted(folder):
    every = commonroad.scenes(folder, HOW, keep_invalid=True)
    good = commonroad.scenes(folder, HOW)
    valid = traffic.valid(every, HOW)
    assert (~valid).sum() == (every.world == 0).sum() == 1
    for a, b in zip(good, traffic.take(every, valid), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"a\.xml must have valid scenes, got 1 with overlaps or vehicles off the lan"):
        commonroad.scenes(folder / "more" / "a.xml", HOW)


# Errors.


BOMB = """<?xml version="1.0"?><!DOCTYPE commonRoad [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>
<commonRoad commonRoadVersion="2020a" timeStepSize="0.1">&b;</commonRoad>"""
CAR = car(state(0, speed=1))


@pytest.mark.parametrize(
    ("xml", "said"),
    [
        ("not XML", r"must be CommonRoad's XML, got a file that is not XML \(syntax error: line 1"),
        ("", r"got a file that is not XML \(no element found"),
        (commonroad_xml(straight(), CAR)[:-20], "got a file that is not XML"),
        ("<net><edge/></net>", "must be CommonRoad's XML, got <net>"),
        (commonroad_xml(straight(), CAR, version="2042z"), "commonRoadVersion must be 2018b or 2020a, got 2042z"),
        (BOMB, "must have no entities, got the entity 'a'"),
        (commonroad_xml(CAR), "lanelets for vehicles must have an area, got none among 0"),
        (commonroad_xml(straight(left=-6), CAR), "lanelets for vehicles must have an area, got none among 1"),
        (
            commonroad_xml(straight(more="<laneletType>sidewalk</laneletType>"), CAR),
            "lanelets for vehicles must have an area, got none among 1",
        ),
        (
            commonroad_xml(lanelet([(0, 0)], [(0, 1), (1, 1)], name=44), CAR),
            "lanelet 44: bounds must have 2 points or more, got 1 and 2",
        ),
        (commonroad_xml(straight(high="nan"), CAR), "lanelet 1: x must be a number, got 'nan'"),
        (commonroad_xml(straight()), r"must have moving vehicles \(bus, car, .*\), got none"),
        (commonroad_xml(straight(), car(state(0, speed=1), kind="pedestrian")), "must have moving vehicles"),
        (commonroad_xml(straight(), CAR, seconds=""), "timeStepSize must be a number, got ''"),
        (commonroad_xml(straight(), CAR, seconds="-1"), "timeStepSize must be > 0, got -1"),
        (
            commonroad_xml(straight(), car(state(0, speed=1), state(3, "inf", speed=1))),
            "obstacle 7: step 3: x must be a number, got 'inf'",
        ),
        (
            commonroad_xml(straight(), car(state(0, speed=1), state(2, position="<lanelet ref='1'/>", speed=1))),
            "obstacle 7: step 2: position must hold one point or rectangle or circle, got lanelet",
        ),
        (
            commonroad_xml(straight(), car(state(0, speed=1, position="<circle><radius>1</radius></circle>"))),
            "obstacle 7: step 0: a rectangle or circle must have a center, got none",
        ),
        (
            commonroad_xml(straight(), car(state(0, speed="fast"))),
            "step 0: velocity must be a number, got 'fast'",
        ),
        (commonroad_xml(straight(), car(state(0))), "obstacle 7: an obstacle must have a velocity or two states, got"),
        (
            commonroad_xml(straight(), car(state(0, speed=1, orientation="<direction/>"))),
            "step 0: orientation must be a number, got none",
        ),
        (commonroad_xml(straight(), car(state(0.5, speed=1))), "time must be a whole number of steps, got 0.5"),
        (
            commonroad_xml(straight(), car(state(0, speed=1), shape="<circle><radius>1</radius></circle>")),
            "obstacle 7: shape must hold one rectangle, got circle",
        ),
        (
            commonroad_xml(straight(), car(state(0, speed=1), shape=rectangle(width=0))),
            "obstacle 7: length and width must be > 0, got 4 and 0",
        ),
    ],
)
def test_a_damaged_file_is_told_with_its_name_and_place(tmp_path, xml, said):
    path = tmp_path / "test.xml"
    path.write_text(xml)
    with pytest.raises(ValueError, match=rf"^commonroad: .*test\.xml: .*{said}"):
        commonroad.read_world(path)


def test_missing_files_and_empty_folders_are_told(tmp_path):
    for read in (commonroad.read_world, commonroad.scenes):
        with pytest.raises(ValueError, match=r"away\.xml must be a file, got none .*No such file"):
            read(tmp_path / "away.xml")
    with pytest.raises(ValueError, match="must be a file, got a folder"):
        commonroad.read_world(tmp_path)
    os.mkfifo(tmp_path / "pipe.xml")
    for path in (tmp_path / "pipe.xml", tmp_path):
        with pytest.raises(DataError, match=r"pipe\.xml must be a file, got a named pipe"):
            commonroad.scenes(path)
    (tmp_path / "pipe.xml").unlink()
    (tmp_path / "loop.xml").symlink_to(tmp_path / "loop.xml")
    with pytest.raises(DataError, match=r"loop\.xml must be a file, got none"):
        commonroad.scenes(tmp_path)
    (tmp_path / "loop.xml").unlink()
    with pytest.raises(ValueError, match=r"must hold files \*\.xml, got a folder without"):
        commonroad.scenes(str(tmp_path))


def test_linked_folders_are_read_once(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("links")
    (place / "linked").symlink_to(folder)
    (folder / "more" / "up").symlink_to(folder)
    (folder / "more" / "self").symlink_to(folder / "more")
    how = HOW._replace(least=12)
    plain, linked = (commonroad.scenes(each, how, keep_invalid=True) for each in (folder, place))
    for a, b in zip(plain, linked, strict=True):
        np.testing.assert_array_equal(a, b)


def test_too_few_vehicles_are_told(folder):
    with pytest.raises(
        ValueError, match="must have 4 or more vehicles in a window of 100 m, got at most 3 at one moment"
    ):
        commonroad.scenes(folder / "c.xml", Cut(least=4))
    with pytest.raises(ValueError, match=r"must have 12 or more vehicles .* got at most 0"):
        commonroad.scenes(folder / "map.xml")
    for every in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="every must be > 0, got"):
            commonroad.scenes(folder, HOW, every=every)


def test_without_shapely_the_error_names_the_extra(folder, monkeypatch):
    before = builtins.__import__
    without = lambda name, *rest: before("no.shapely" if name == "shapely" else name, *rest)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"shapely must be installed, got none: pip install 'gendiff\[traffic\]'"):
        commonroad.read_world(folder / "b.xml")


# Real files.


@pytest.fixture(scope="module")
def samples():
    files = sorted(SAMPLES.glob("*.xml"))
    if not files:
        pytest.skip("no files in $GENDIFF_DATA/commonroad")
    return files


def centre_lines(path):
    """Middles and directions of the pieces of all lanelets."""
    pieces = []
    for lanelet in ElementTree.parse(path).getroot().iterfind("lanelet"):
        left, right = (
            np.array([[float(p.findtext(axis)) for axis in "xy"] for p in lanelet.iterfind(f"{side}Bound/point")])
            for side in ("left", "right")
        )
        line = (left + right) / 2
        pieces.append(np.concatenate([(line[1:] + line[:-1]) / 2, np.diff(line, axis=0)], 1))
    every = np.concatenate(pieces)
    return every[np.hypot(*every[:, 2:].T) > 0]  # some points are twice in a row


def test_recorded_vehicles_are_on_the_road_and_follow_it(samples):
    along, off, number = 0, 0, 0
    for path in samples:
        if "bstacle id=" not in path.read_text():  # a map only
            continue
        world = commonroad.read_world(path, every=1.0)
        vehicles = np.concatenate([moment.vehicles for moment in world.moments])
        assert (np.abs(np.hypot(vehicles[:, 4], vehicles[:, 5]) - 1) < 1e-12).all()
        assert ((vehicles[:, 2:4] > 0.5) & (vehicles[:, 2:4] < 25)).all()
        pieces = centre_lines(path)
        near = np.argsort(np.linalg.norm(vehicles[:, None, :2] - pieces[None, :, :2], axis=-1), axis=1)[:, :5]
        directions = pieces[near, 2:] / np.linalg.norm(pieces[near, 2:], axis=-1, keepdims=True)
        cosines = (directions * vehicles[:, None, 4:6]).sum(-1).max(1)  # lanelets cross
        along += (cosines > np.cos(np.radians(20))).sum()
        off += (~shapely.contains_xy(world.drivable, vehicles[:, :2])).sum()
        number += len(vehicles)
    assert number > 100
    assert along / number > 0.95
    assert off / number < 0.02


def test_scenes_of_real_files(samples):
    scenes = commonroad.scenes(SAMPLES, Cut(least=2))
    assert len(scenes.world) > 20
    assert (scenes.present.sum(1) >= 2).all()
    assert traffic.valid(scenes, Cut(least=2)).all()
    assert (np.abs(scenes.vehicles[scenes.present][:, :2]) < 50).all()
    assert not scenes.vehicles[~scenes.present].any()
