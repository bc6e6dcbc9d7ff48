"""What models.yaml and the services become, and what each kind of mistake says."""

import json
import sys
from pathlib import Path

import pytest

from orchestrator.catalogue.read import DEMO_BYTES, host_budget_bytes, read_catalogue
from orchestrator.catalogue.schema import json_schemas
from orchestrator.core.entities import HOST, MIB, Demand
from orchestrator.core.errors import CatalogueError, UnknownModel
from orchestrator.settings import load_settings
from tests.catalogue.conftest import LLAMA, House
from tests.catalogue.test_files import download
from tests.estimate.ggufs import llama

REPOSITORY = Path(__file__).parents[2]
GIB = 1024 * MIB


def test_a_model_with_everything(house: House) -> None:
    llama(house.folder / "files" / "big.gguf")
    catalogue = house.read(
        """\
        models:
          big:
            service: llama-cpp
            path: files/big.gguf
            memory: 6600MiB
            host_memory: 1GiB
            context_size: 4096
            gpus: 2
            idle_after: never
            priority: 70
            pinned: true
            deadline: 20m
            aliases: [b1, org/b2]
            served_name: inner
            container_name: big-one
            environment: {EXTRA: 1, FLAG: true}
            start_timeout: 5m
            drain_limit: 1m
            queue_limit: 3
            description: Large.
        """
    )
    model = catalogue.resolve("org/b2")
    assert model is catalogue.resolve("big")
    assert model.demand == Demand(6600 * MIB, GIB, "declared")
    assert (model.gpu_counts, model.devices) == ((2,), ())
    assert (model.idle_after_s, model.deadline_s, model.start_timeout_s) == (None, 1200, 300)
    assert (model.priority, model.pinned, model.queue_limit, model.drain_limit_s) == (70, True, 3, 60)
    assert (model.served_name, model.description, model.problem) == ("inner", "Large.", None)
    assert model.launch.command == (sys.executable, "-m", "orchestrator.local.llama")
    assert model.launch.container_name == "big-one"
    assert model.launch.environment == {
        "MODEL_PATH": str(house.folder / "files" / "big.gguf"),
        "MMPROJ_PATH": "",
        "MODEL_NAME": "inner",
        "EXTRA": "1",
        "FLAG": "true",
    }
    assert model.launch.mounts == ((str(house.folder / "files"), "/models"),)
    assert model.launch.container_environment["MODEL_PATH"] == "/models/big.gguf"


def test_defaults_come_from_the_settings_and_the_service(house: House) -> None:
    llama(house.folder / "m.gguf")
    model = house.read("models: {m: m.gguf}", idle_after="5m", priority=10, queue_limit=9).resolve("m")

    assert (model.idle_after_s, model.priority, model.queue_limit) == (300, 10, 9)
    assert model.deadline_s == model.start_timeout_s == 600, "never under the service's start timeout"
    assert model.launch.environment["MODEL_NAME"] == "m"
    assert model.demand.source == "predicted"


def test_an_estimate_knows_about_gpus_layers_and_the_prompt_cache(house: House) -> None:
    llama(house.folder / "m.gguf", layers=9)
    models = """\
        models:
          plain: m.gguf
          cached: {service: llama-cpp, path: m.gguf, environment: {CACHE_RAM_MIB: 100}}
          split: {service: llama-cpp, path: m.gguf, n_gpu_layers: 5, context_size: 100000}
          whole: {service: llama-cpp, path: m.gguf, context_size: 100000}
          in-ram: {service: llama-cpp, path: m.gguf, gpus: 0}
        """
    needs = {model.id: model.demand for model in house.read(models).models.values()}
    assert needs["plain"].gpu_bytes > 600 * MIB
    assert needs["cached"].host_bytes - needs["plain"].host_bytes == 100 * MIB
    assert needs["split"].gpu_bytes < needs["whole"].gpu_bytes
    assert needs["split"].host_bytes > needs["whole"].host_bytes
    assert needs["in-ram"].gpu_bytes == 0
    assert house.read(models).resolve("in-ram").devices == (HOST,)

    for catalogue in (house.read(models, devices="host"), read_catalogue(house.settings(), on_gpu=False)):
        assert catalogue.resolve("plain").demand.gpu_bytes == 0
        assert 0 < catalogue.resolve("plain").demand.host_bytes < 200 * MIB


@pytest.mark.parametrize(
    ("gpus", "counts", "devices"),
    [
        ("1", (1,), ()),
        ("auto", tuple(range(1, 17)), ()),
        ("[GPU-aa, GPU-bb]", (2,), ("GPU-aa", "GPU-bb")),
        ("[GPU-aa]", (1,), ("GPU-aa",)),
        ("0", (1,), (HOST,)),
    ],
)
def test_where_it_may_go(house: House, gpus: str, counts: tuple[int, ...], devices: tuple[str, ...]) -> None:
    catalogue = house.read(f"models: {{ui: {{service: comfyui, memory: 12GiB, gpus: {gpus}}}}}")
    model = catalogue.resolve("ui")
    assert (model.gpu_counts, model.devices, model.api) == (counts, devices, "http")


# --- mistakes

NEITHER = "a service needs an image (docker engine), a command (process engine), or both"

GOOD = """\
models:
  first:
    service: comfyui
    memory: 1GiB
  foo:
    service: llama-cpp
    path: foo.gguf
    priority: 5
"""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("context_size: big", 'context_size: got "big", expected a whole number, or auto'),
        ("context_size: -1", "context_size: got -1, expected a positive whole number"),
        ("context_size: 0", "context_size: got 0, expected a positive whole number"),
        ("context_size: true", "context_size: got true, expected a whole number"),
        ("context_size: 1.5", "context_size: got 1.5, expected a whole number"),
        ("contextsize: 1", "contextsize: unknown field; did you mean 'context_size'? allowed: aliases, "),
        ("memory: 6600", "memory: got 6600, expected a size with its unit, such as 6600MiB"),
        ("memory: 12GiBB", 'memory: got "12GiBB", expected a size'),
        ("idle_after: 3 weeks", 'idle_after: got "3 weeks", expected a duration such as 10s, 30m'),
        ("pinned: 7", "pinned: got 7, expected true or false"),
        ("gpus: -1", "gpus: got -1, expected a number of GPUs from 0 to 16, auto, or a list"),
        ("gpus: [0]", "gpus: got [0], expected a number of GPUs"),
        ("gpus: ['0']", 'gpus: got ["0"], expected a GPU by its UUID'),
        ("n_gpu_layers: -1", "n_gpu_layers: got -1, expected at least 0"),
        ("cache_type_k: q3", "cache_type_k: got \"q3\", expected one of 'f32', 'f16'"),
        ("parallel: 1000", "parallel: got 1000, expected at most 256"),
        ("source: {demo: 1}", "expected path or source, not both"),
        ("source: {repo: a/b}", "source: got"),
        ("source: here", 'source: got "here", expected a mapping'),
        ("source: {repo: a/b, fil: c}", "source.fil: unknown field; did you mean 'file'? allowed: demo, "),
        ("environment: {A-B: 1}", "environment: 'A-B' cannot be the name"),
        ("environment: {A: 1.50}", "environment.A: got 1.5, expected text: put it in quotes"),
        ("environment: {A: '{pth}'}", "environment.A: unknown placeholder {pth}; did you mean 'path'?"),
        ("environment: {A: [b]}", 'environment.A: got ["b"], expected text'),
        ("environment: {NVIDIA_VISIBLE_DEVICES: all}", "environment: 'NVIDIA_VISIBLE_DEVICES' is set by"),
        ("aliases: [first]", "aliases.0: 'first' is already a name of 'first'"),
        ("aliases: [foo]", "aliases.0: 'foo' is already a name of 'foo'"),
        ("aliases: [a, a]", "aliases.1: 'a' is already a name of 'foo'"),
        ("aliases: ['a b']", 'aliases.0: got "a b", expected a name of letters, digits'),
        ("container_name: -x", 'container_name: got "-x", expected a container name'),
        ("description: [x]", 'description: got ["x"], expected text'),
    ],
)
def test_a_mistake_in_line_12_names_line_12(house: House, line: str, says: str) -> None:
    text = GOOD + "    queue_limit: 5\n    drain_limit: 1m\n\n    " + line + "\n"
    assert text.splitlines()[11].strip() == line
    errors = house.errors(text)
    assert len(errors) == 1
    if errors[0].startswith("models.yaml, line 5: models.foo: "):  # of the entry as a whole
        assert says in errors[0]
    else:
        assert errors[0].startswith(f"models.yaml, line 12: models.foo.{says}"), errors[0]


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ("models: [a]", 'line 1: models: got ["a"], expected a mapping'),
        ("- a", 'line 1: got ["a"], expected a mapping'),
        ("modls: {}", "line 1: modls: unknown field; did you mean 'models'? allowed: models"),
        ("models:\n  a: 5", "line 2: models.a: got 5, expected a mapping"),
        ("models:\n  a: {memory: 1GiB}", "line 2: models.a.service: missing, and there is no default"),
        ("models:\n  'a b': m.gguf", 'line 2: models.a b: got "a b", expected a name of letters'),
        ("models:\n  ../a: m.gguf", 'line 2: models.../a: got "../a", expected a name'),
        ("models:\n  a: m.gguf\n  a: n.gguf", "line 3: the key 'a' stands here twice, first in line 2"),
        (
            "models:\n  a: {service: lama-cpp}",
            "line 2: models.a.service: there is no service 'lama-cpp'; did",
        ),
        ("models:\n  a: {service: llama-cpp}", "line 2: models.a: the service 'llama-cpp' needs a file"),
        ("models:\n  a: {service: x, mmproj: y}", "line 2: models.a: got"),
        ("models:\n  a: [", "line 3: not valid YAML"),
    ],
)
def test_mistakes_in_the_frame(house: House, models: str, says: str) -> None:
    errors = house.errors(models + "\n")
    assert any(error.startswith(f"models.yaml, {says}") for error in errors), errors


def test_names_of_containers_are_for_one_model(house: House) -> None:
    errors = house.errors(
        """\
        models:
          a: {service: comfyui, memory: 1GiB, container_name: c}
          b: {service: comfyui, memory: 1GiB, container_name: c}
        """
    )
    assert errors == ["models.yaml, line 3: models.b.container_name: 'c' is already that of 'a'"]


def test_all_mistakes_of_all_files_are_told_at_once(house: House) -> None:
    house.write("services/comfyui/service.yaml", "image: x\nport: high\nimge: y\n")
    house.write("services/other/service.yaml", "port: 1\n")
    errors = house.errors(
        """\
        models:
          a: {service: llama-cpp, path: a.gguf, context_size: x, parallel: y}
          b: {service: nobody}
          c: {service: llama-cpp, path: c.gguf, aliases: [b]}
        """
    )
    assert [error.split(": ")[:2] for error in errors] == [
        ["services/comfyui/service.yaml, line 2", "port"],
        ["services/comfyui/service.yaml, line 3", "imge"],
        ["services/other/service.yaml, line 1", NEITHER],
        ["models.yaml, line 2", "models.a.context_size"],
        ["models.yaml, line 2", "models.a.parallel"],
        ["models.yaml, line 4", "models.c.aliases.0"],
        ["models.yaml, line 3", "models.b.service"],
    ]  # fmt: skip


MANY = "models:\n" + "".join(f"  m{n}: {{service: comfyui, memory: 1GiB}}\n" for n in range(9))


def test_a_service_that_is_written_wrong_is_told_once(house: House) -> None:
    house.write("services/comfyui/service.yaml", "image: x\nprot: 1\n")
    (error,) = house.errors(MANY)
    assert error.startswith("services/comfyui/service.yaml, line 2: prot: unknown field")
    house.write("services/comfyui/service.yaml", "image: [\n")
    (error,) = house.errors(MANY)
    assert error.startswith("services/comfyui/service.yaml, line 2: not valid YAML")


def test_a_missing_folder_of_services_is_told_once(house: House) -> None:
    (error,) = house.errors(MANY, services=house.folder / "none")
    assert error == "none: there is no such folder of services"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("privileged: true", "privileged: unknown field"),
        ("cap_add: [SYS_ADMIN]", "cap_add: unknown field"),
        ("health: {path: health}", 'health.path: got "health", '),
        ("health: {timeout: 3}", "health.timeout: unknown field"),
        ("health: {start_timeout: 0}", "health.start_timeout: got 0, expected more than 0"),
        ("command: python", 'command: got "python", expected a list'),
        ("command: []", "command: got [], "),
        ("command: [run, '{prt}']", "command.1: unknown placeholder {prt}; did you mean 'port'?"),
        ("volumes: {/etc: /data}", "volumes./etc: host folders may come only from under mount_roots, which"),
        ("volumes: {../x: /data}", "volumes: '../x' is neither a volume's name nor an absolute path"),
        ("volumes: {x-1: data}", "volumes: 'data' is no absolute path inside the container"),
        ("volumes: {x-1: /a/../b}", "volumes: '/a/../b' is no absolute path inside the container"),
        ("volumes: {x-1: /proc/x}", "volumes: nothing may be mounted over '/proc/x'"),
        ("volumes: {/var/run/docker.sock: /s}", "volumes./var/run/docker.sock: an engine's socket is never"),
        ("volumes: {/run: /s}", "volumes./run: an engine's socket is never given"),
        ("shm_size: 1", "shm_size: got 1, expected a size"),
        ("memory: guess", "memory: got \"guess\", expected one of 'gguf' or 'declared'"),
    ],
)
def test_services_have_a_closed_schema(house: House, line: str, says: str) -> None:
    house.write("services/comfyui/service.yaml", f"image: x\n{line}\n")
    errors = house.errors("models: {}")
    assert len(errors) == 1
    assert errors[0].startswith(f"services/comfyui/service.yaml, line 2: {says}"), errors[0]


def test_bind_mounts_under_the_roots_only_and_links_do_not_lead_out(house: House) -> None:
    root = house.folder / "srv"
    (root / "data").mkdir(parents=True)
    (root / "way-out").symlink_to("/etc")
    allowed = {"mount_roots": (root,)}

    house.write("services/comfyui/service.yaml", f"image: x\nvolumes: {{{root}/data: /data, named: /n}}\n")
    models = "models: {ui: {service: comfyui, memory: 1GiB}}"
    launch = house.read(models, **allowed).resolve("ui").launch
    assert launch.volumes == {str(root / "data"): "/data", "named": "/n"}

    for outside in (f"{root}/way-out", f"{root}/../other", f"{root}x"):
        house.write("services/comfyui/service.yaml", f"image: x\nvolumes: {{{outside}: /data}}\n")
        assert f"mount_roots, which has {root}" in house.errors(models, **allowed)[0]


# --- files that are not as they should be


def test_models_with_bad_files_are_listed_with_the_reason(house: House) -> None:
    data = llama(house.folder / "good.gguf").read_bytes()
    (house.folder / "short.gguf").write_bytes(data[:-500])
    house.write("text.gguf", "hello")
    catalogue = house.read(
        """\
        models:
          good: good.gguf
          absent: gone/absent.gguf
          short: short.gguf
          text: text.gguf
          declared: {service: llama-cpp, path: gone.gguf, memory: 1GiB}
          undeclared: {service: comfyui}
          hub: {service: llama-cpp, source: {repo: Org/Name-GGUF, file: "*q4*.gguf", mmproj: "mmproj*"}}
        """
    )
    problems = {model.id: model.problem for model in catalogue.models.values()}
    assert problems.pop("good") is None
    wanted = {
        "absent": f"There is no file {house.folder}/gone/absent.gguf.",
        "short": "is cut short: its tensors end at byte",
        "text": "is not a GGUF file.",
        "declared": "There is no file",
        "undeclared": "declare memory: for 'undeclared', such as 12GiB",
        "hub": "get it with: orchestrator pull hub",
    }
    for name, text in wanted.items():
        assert text in str(problems[name]), problems[name]
    assert catalogue.resolve("absent").demand.source == "unknown"
    assert len(catalogue.problems) == 6
    assert catalogue.problems[0].startswith("absent: There is no file")


def test_a_file_in_the_root_is_never_mounted(house: House) -> None:
    model = house.read("models: {m: {service: comfyui, path: /etc, memory: 1GiB}}").resolve("m")
    assert model.launch.mounts == (("/etc", "/models"),), "a folder of weights is mounted by itself"
    model = house.read("models: {m: {service: comfyui, path: /, memory: 1GiB}}").resolve("m")
    assert "never given to a container" in str(model.problem)


# --- demos and folders


def test_without_a_catalogue_there_are_two_demos(house: House) -> None:
    catalogue = house.read()
    assert list(catalogue.models) == ["demo", "demo-2"]
    assert catalogue.only_demos
    assert sorted(catalogue.demos.values()) == [7, 8]
    assert all(model.demand == Demand(DEMO_BYTES) for model in catalogue.models.values())
    assert {path.parent for path in catalogue.demos} == {house.folder / "state" / "demo"}
    assert all(model.problem is None for model in catalogue.models.values())


def test_a_link_to_a_file_of_models_that_is_not_there_is_no_wish_for_demos(house: House) -> None:
    """A start with the demos would end the models that run."""
    (house.folder / "models.yaml").symlink_to(house.folder / "away" / "models.yaml")
    (error,) = house.errors()
    assert error.endswith("models.yaml: there is no such file of models")


def test_a_model_in_the_folder_of_nobody_is_listed_with_that_problem(house: House) -> None:
    entry = "{service: llama-cpp, path: ~nobody-of-that-name/x.gguf}"
    catalogue = house.read(f"models: {{m: {entry}}}")
    assert "there is no user whose folder is ~nobody-of-that-name" in (catalogue.resolve("m").problem or "")


def test_demos_without_their_writer_have_a_problem(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "install the extra 'local'" in str(house.read().resolve("demo").problem)


def test_a_named_catalogue_must_be_there(house: House) -> None:
    assert "there is no such file of models" in house.errors(None, models=house.folder / "no.yaml")[0]


def test_no_model_is_written_as_such(house: House) -> None:
    catalogue = house.read("models: {}\n")
    assert (dict(catalogue.models), catalogue.only_demos) == ({}, False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1: models: the file is empty"),
        ("# nothing\n", "line 1: models: the file is empty"),
        ("{}\n", "line 1: models: the file is empty"),
        ("# mine\nmodels:\n  # a: {service: x}\n", "line 2: models: nothing stands below it"),
    ],
)
def test_an_emptied_catalogue_is_no_wish_for_no_models(house: House, text: str, says: str) -> None:
    assert house.errors(text) == [f"models.yaml, {says}; write 'models: {{}}' if no model is meant"]


def test_a_catalogue_that_was_there_must_be_there_again(house: House) -> None:
    before = house.read("models: {}\n")
    (house.folder / "models.yaml").unlink()
    with pytest.raises(CatalogueError, match=r"^models\.yaml: there is no such file of models$"):
        read_catalogue(house.settings(), before=before)
    demos = house.read()
    assert list(read_catalogue(house.settings(), before=demos).models) == ["demo", "demo-2"]


def test_a_folder_of_models_that_was_there_must_be_there_again(house: House) -> None:
    (house.folder / "ggufs").mkdir()
    settings = house.settings(models_dir=house.folder / "ggufs")
    before = read_catalogue(settings)
    (house.folder / "ggufs").rmdir()
    assert "models_dir offers nothing" in read_catalogue(settings).problems[0]  # as at the start
    with pytest.raises(CatalogueError, match=r"^ggufs: there is no such folder of models any more$"):
        read_catalogue(settings, before=before)


def test_the_repository_lists_the_demos_with_its_own_service(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(
        services=REPOSITORY / "services",
        models=REPOSITORY / "models.yaml",
        database=house.folder / "state" / "o.db",
    )
    catalogue = read_catalogue(settings)
    assert list(catalogue.models) == ["demo", "demo-2"]
    assert catalogue.only_demos
    launch = catalogue.resolve("demo").launch
    assert launch.environment["MODEL_PATH"] == str(house.folder / "state" / "demo" / "demo-7.gguf")
    assert launch.container_environment["MODEL_PATH"] == "/models/demo-7.gguf"
    assert launch.environment["CACHE_RAM_MIB"] == "0"


def test_a_folder_of_ggufs_is_offered_and_written_entries_win(house: House) -> None:
    folder = house.folder / "ggufs"
    for name in ("a.gguf", "B b.GGUF", "sub/c.gguf", "mmproj-a.gguf", "named.gguf", "sub/a.gguf"):
        llama(folder / name)
    for part in (1, 2):
        llama(folder / f"split-0000{part}-of-00002.gguf", prefix=f"{part}.")
    (folder / "notes.txt").write_text("x")
    catalogue = house.read(
        "models: {named: {service: comfyui, memory: 1GiB, aliases: [c]}}", models_dir=folder
    )
    assert sorted(catalogue.models) == ["B-b", "a", "named", "split"]
    assert catalogue.resolve("named").launch.service == "comfyui"
    assert catalogue.resolve("split").launch.environment["MODEL_PATH"].endswith("split-00001-of-00002.gguf")
    assert catalogue.problems == (f"{folder}/sub/a.gguf is not offered: {folder}/a.gguf has that name.",)

    (house.folder / "models.yaml").unlink()
    beside = house.read(models_dir=folder)
    assert {"demo", "demo-2", "a", "c"} <= set(beside.models)
    assert not beside.only_demos
    assert "there is no folder" in house.read(models_dir=house.folder / "nowhere").problems[0]


def test_unknown_names_list_what_there_is(house: House) -> None:
    with pytest.raises(UnknownModel, match=r"no model 'x'\. The catalogue has: demo, demo-2"):
        house.read().resolve("x")


def test_the_budget_of_the_host(house: House) -> None:
    demos, own = house.read(), house.read("models: {ui: {service: comfyui, memory: 1GiB}}")
    ram = 16 * GIB
    budget, why = host_budget_bytes(house.settings(), demos, ram)
    assert budget == 96 * MIB
    assert "only demo models" in why
    assert host_budget_bytes(house.settings(), own, ram) == (ram * 8 // 10, "80 % of 16.0 GiB of RAM")
    chosen = house.settings(host_memory_mib=3000)
    assert host_budget_bytes(chosen, demos, ram) == (3000 * MIB, "host_memory_mib is set to 3000")


def test_schemas_for_editors_accept_what_the_reader_accepts(house: House) -> None:
    schemas = json_schemas()
    assert set(schemas) == {"service.yaml", "models.yaml"}
    json.dumps(schemas)
    assert schemas["service.yaml"]["additionalProperties"] is False
    entry = schemas["models.yaml"]["$defs"]["ModelEntry"]["anyOf"]
    assert [kind["type"] for kind in entry] == ["string", "object"]
    assert "context_size" in entry[1]["properties"]
    assert LLAMA.count("memory: gguf") == 1


@pytest.mark.parametrize(
    ("volumes", "target", "read_only"),
    [
        ("{}", "/data/.huggingface", True),
        ("{hf-cache: /cache/}", "/cache", False),
        ("{hf-cache: /cache:ro}", "/cache", True),
    ],
)
def test_models_of_the_cache_are_read_from_its_volume(
    house: House, volumes: str, target: str, read_only: bool
) -> None:
    snapshot = download(house.folder / "hf" / "hub", "o/m", "c", "m.gguf")
    house.write("services/llama-cpp/service.yaml", LLAMA + f"volumes: {volumes}\n")
    own = llama(house.folder / "own" / "own.gguf")
    hub = "{service: llama-cpp, source: {repo: o/m, file: m.gguf}}"
    text = f"models: {{hub: {hub}, own: {own}}}"
    models = house.read(text, hub_volume="hf-cache").models
    launch = models["hub"].launch
    path = f"{target}/hub/models--o--m/snapshots/c/m.gguf"
    assert launch.container_environment["MODEL_PATH"] == path
    assert launch.environment["MODEL_PATH"] == str(snapshot / "m.gguf"), "a process sees it where it is"
    assert launch.mounts == ()
    assert launch.volumes["hf-cache"].rstrip("/") == target
    assert launch.read_only_volumes == (frozenset({"hf-cache"}) if read_only else frozenset())
    other = models["own"].launch
    assert other.container_environment["MODEL_PATH"] == "/models/own.gguf"
    assert ("hf-cache" in other.volumes) == (volumes != "{}"), "whoever does not need it does not get it"


def test_the_cache_may_have_another_name_here(house: House) -> None:
    """One file of a service fits every installation."""
    download(house.folder / "hf" / "hub", "o/m", "c", "m.gguf")
    house.write(
        "services/llama-cpp/service.yaml", LLAMA + "volumes: {hf-cache: '/cache:ro', other: /other}\n"
    )
    hub = "{service: llama-cpp, source: {repo: o/m, file: m.gguf}}"
    launch = house.read(f"models: {{hub: {hub}}}", hub_volume="mine").models["hub"].launch
    assert launch.volumes == {"mine": "/cache", "other": "/other"}
    assert launch.read_only_volumes == {"mine"}
    assert launch.container_environment["MODEL_PATH"].startswith("/cache/hub/models--o--m/")


def test_a_path_may_name_the_latest_revision(house: House) -> None:
    snapshot = download(house.folder / "hf" / "hub", "o/m", "c", "M-Q4.gguf")
    folder = house.folder / "hf" / "hub" / "models--o--m" / "snapshots" / "latest"
    found = house.read(f"models: {{there: {folder}/m-q4.gguf, lost: {folder}/other.gguf}}").models
    assert found["there"].launch.environment["MODEL_PATH"] == str(snapshot / "M-Q4.gguf")
    assert "get it with: hf download o/m other.gguf" in (found["lost"].problem or "")
