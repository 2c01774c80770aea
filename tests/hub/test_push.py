"""`deltanet push` against a Hub on loopback: what arrives, what is refused, and what is left when something fails."""

import dataclasses
import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import typer
from folders import REPO, add_card, client, write_checkpoint
from huggingface_hub import HfApi, constants, snapshot_download
from loopback import TOKEN
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from deltanet_conversion.card import make_card
from deltanet_conversion.cli_publish import register
from deltanet_conversion.collect import collect
from deltanet_conversion.push import (
    HubFailure,
    PushRefused,
    VerificationFailed,
    _content,
    _missing_code,
    prepare,
    preview,
    publish,
    push,
)
from modeling_deltanet import DeltaNetForCausalLM, register_remote_code


CODE = {
    "modeling_deltanet.py", "configuration_deltanet.py", "delta_rule.py", "kernel_switch.py", "cache_deltanet.py",
    "packing_deltanet.py", "short_conv.py", "cuda_graph.py", "liger_deltanet.py", "versions_deltanet.py",
    "after_import.py", "linear_attention_deltanet.py", "norm_deltanet.py", "rotary_deltanet.py",
}  # fmt: skip
CLI = "from deltanet_conversion.cli import main; main()"
PULL = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
there, here = (AutoModelForCausalLM.from_pretrained(x, trust_remote_code=True).eval() for x in sys.argv[1:3])
assert type(there).__module__.startswith("transformers_modules.me."), type(there).__module__
assert AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)("w5 w7").input_ids == [5, 7]
x = torch.arange(1, 21).view(1, 20)
assert torch.equal(there(x).logits, here(x).logits)
"""


def sent_to(hub) -> list[str]:
    """The requests that change something on the Hub."""
    return [path for method, path in hub.requests if method in ("POST", "PUT") and "validate" not in path]


def changed(plan, **contents: bytes):
    """`plan` with other contents of some files (`_` for a dot in their names)."""
    new = {name.replace("_", "."): _content(content) for name, content in contents.items()}
    return dataclasses.replace(plan, files=plan.files | new)


# --------------------------------------------------------------------------------------------------- what arrives


def test_a_pushed_model_is_the_model(hub, checkpoint, tmp_path):
    """A user who loads the published repository, without this package's code, would get other logits, or nothing."""
    done = client(CLI, hub, tmp_path, "push", str(checkpoint), REPO, "--private", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(hub.files(REPO)) == {path.name for path in checkpoint.iterdir()} | CODE | {"LICENSE"}
    assert hub.repositories[REPO].private
    assert result["commit"] == hub.repositories[REPO].branches["main"]
    assert result["verified"] == len(hub.files(REPO))
    assert sum("/commit/" in path for path in sent_to(hub)) == 1
    assert "auto_map" not in json.loads((checkpoint / "config.json").read_text())  # the folder is as it was

    register_remote_code()
    DeltaNetForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "here")
    pulled = client(PULL, hub, tmp_path, REPO, str(tmp_path / "here"))
    assert pulled.returncode == 0, pulled.stderr


def test_pushing_again_sends_nothing(hub, plan):
    """Every re-push would add an empty commit, or upload gigabytes that are there."""
    first = publish(plan)
    hub.requests.clear()
    again = publish(plan)
    assert not again.sent
    assert again.commit == first.commit
    assert sent_to(hub) == []


def test_only_what_changed_is_sent(hub, plan):
    """A corrected card would upload the weights again."""
    publish(plan)
    hub.requests.clear()
    again = publish(changed(plan, README_md=plan.files["README.md"].source.read_bytes() + b"\nOne more line.\n"))
    assert again.changes.changed == ["README.md"]
    assert not any("lfs" in path for path in sent_to(hub))
    assert hub.files(REPO)["README.md"].endswith(b"One more line.\n")


def test_weights_of_an_earlier_push_go(hub, plan):
    """from_pretrained prefers a model.safetensors to newer shards beside it: users would load the old model."""
    publish(changed(plan, model_safetensors_index_json=b"{}", LICENSE=b"Apache-2.0"))
    again = publish(plan)
    assert again.changes.removed == ["model.safetensors.index.json"]
    assert set(hub.files(REPO)) == set(plan.files) | {"LICENSE"}


def test_a_branch_and_a_pull_request_leave_main_alone(hub, plan):
    """Somebody who wants a review first would publish at once."""
    main = publish(plan).commit
    other = changed(plan, config_json=plan.files["config.json"].source + b" ")
    branch = publish(other, revision="step-2000")
    assert hub.files(REPO, "step-2000")["config.json"].endswith(b" ")
    request = publish(changed(plan, config_json=plan.files["config.json"].source + b"  "), create_pr=True)
    assert request.pull_request.endswith("/discussions/1")
    assert hub.files(REPO, "refs/pr/1")["config.json"].endswith(b"  ")
    assert hub.repositories[REPO].branches["main"] == main
    assert len({main, branch.commit, request.commit}) == 3
    with pytest.raises(ValueError, match="'step-2000'"):
        publish(plan, revision="step-2000", create_pr=True)


def test_private_is_never_public(hub, plan):
    """The Hub ignores the wish for privacy where the repository exists: a private model would be public."""
    hub.create(REPO)
    with pytest.raises(HubFailure, match="is public"):
        publish(plan, private=True)
    assert hub.files(REPO) == {}
    assert sent_to(hub) == []


def test_an_adapter_goes_as_an_adapter_with_its_base_named(hub, checkpoint, tmp_path):
    """An adapter would be published with a folder of this machine as its base, which nobody else can load."""
    adapter = get_peft_model(DeltaNetForCausalLM.from_pretrained(checkpoint), LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapter.save_pretrained(tmp_path / "adapter")
    folder = add_card(tmp_path / "adapter", "me/tiny-lora", base_model=REPO)
    with pytest.raises(PushRefused) as refused:
        prepare(folder, "me/tiny-lora")
    assert any(p.file == "adapter_config.json" and str(checkpoint) in p.what for p in refused.value.problems)

    done = push(folder, "me/tiny-lora", base_model=REPO)
    files = hub.files("me/tiny-lora")
    assert set(files) == {"README.md", "LICENSE", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == REPO
    assert f"base_model: {REPO}\n" in files["README.md"].decode()
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert done.verified == 4


def test_the_preview_says_what_would_happen(hub, plan, tmp_path):
    """A dry run that is wrong, or that sends something, is worse than none."""
    assert preview(plan).new == list(plan.files)
    publish(changed(plan, config_json=b"{}", old_safetensors=b"12345678"))
    hub.requests.clear()
    changes = preview(plan)
    assert (changes.new, changes.changed, changes.removed) == ([], ["config.json"], ["old.safetensors"])
    assert sorted(changes.unchanged) == sorted(set(plan.files) - {"config.json"})
    assert sent_to(hub) == []


# --------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def published(hub, plan):
    """A Hub that holds an older version, and the function that asserts that it still does."""
    older = changed(plan, model_safetensors=b"older weights", README_md=b"---\nlicense: mit\n---\nolder")
    commit = publish(older).commit
    before = hub.files(REPO)

    def is_untouched():
        assert hub.repositories[REPO].branches == {"main": commit}
        assert hub.files(REPO) == before

    return is_untouched


def test_a_commit_that_fails_changes_nothing(hub, plan, published):
    """After the Hub's 500 a repository would hold half of the new files, or the user would not know where it
    stands.
    """
    hub.fail("POST", "/commit/", status=500)
    with pytest.raises(HubFailure, match=r"500 to POST .*/commit/main.*still at [0-9a-f]{40}"):
        publish(plan)
    published()
    hub.requests.clear()
    assert publish(plan).sent
    assert not any(path.startswith("/lfs/") for path in sent_to(hub))  # it goes on from what was uploaded
    assert hub.files(REPO)["model.safetensors"] == plan.files["model.safetensors"].source.read_bytes()


def test_a_commit_whose_answer_was_lost_counts(hub, plan, published):
    """A push that has arrived would be reported as failed, and sent twice."""
    hub.fail("POST", "/commit/", status=502, handle_first=True)
    done = publish(plan)
    assert done.commit == hub.repositories[REPO].branches["main"]
    assert hub.files(REPO)["model.safetensors"] == plan.files["model.safetensors"].source.read_bytes()


def test_a_connection_that_drops_inside_an_upload_is_tried_again(hub, plan, published):
    """One lost packet would cost an upload of hours."""
    hub.fail("PUT", "/lfs/", drop_after=1000)
    assert publish(plan).sent
    assert sum(path.startswith("/lfs/") for path in sent_to(hub)) == 3  # the older weights; twice the new ones
    assert hub.files(REPO)["model.safetensors"] == plan.files["model.safetensors"].source.read_bytes()


def test_a_connection_that_keeps_dropping_changes_nothing(hub, plan, published, monkeypatch):
    """A repository would be left with a new config and old weights."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail("PUT", "/lfs/", drop_after=1000, times=100)
    with pytest.raises(HubFailure, match="model.safetensors.*Nothing was committed"):
        publish(plan)
    published()


def test_ctrl_c_changes_nothing(hub, plan, published, monkeypatch):
    """Whoever stops a long push would leave a repository that is neither the old version nor the new one."""
    upload = HfApi.preupload_lfs_files

    def upload_then_stop(*args, **kwargs):
        upload(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(HfApi, "preupload_lfs_files", upload_then_stop)
        with pytest.raises(KeyboardInterrupt):
            publish(plan)
    published()
    hub.requests.clear()
    assert publish(plan).sent
    assert not any(path.startswith("/lfs/") for path in sent_to(hub))


@pytest.mark.parametrize(
    "call", ["GET /api/models/me/tiny", "POST /preupload/", "POST /lfs/objects/batch", "POST /commit/"]
)
def test_a_refused_token_is_named_wherever_it_is_refused(hub, plan, published, call):
    """huggingface_hub reports a 401 as a repository that does not exist: the user would look in the wrong place."""
    method, path = call.split()
    hub.fail(method, path, status=401, body={"error": "Invalid username or password."}, times=9)
    with pytest.raises(HubFailure, match="401.*token is missing, wrong or expired"):
        publish(plan)
    hub.faults.clear()
    published()


def test_a_wrong_token_creates_nothing(hub, plan):
    """The first push of somebody who is not logged in would fail with a riddle."""
    with pytest.raises(HubFailure, match="401.*hf auth login"):
        publish(plan, token="hf_wrong")
    assert hub.repositories == {}


def test_a_repository_that_appears_meanwhile_is_used(hub, plan, monkeypatch):
    """Two jobs that create one repository at once: the second would stop at the Hub's 409."""
    create = HfApi.create_repo

    def create_after_somebody_else(*args, **kwargs):
        hub.create(REPO)
        return create(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_repo", create_after_somebody_else)
    assert publish(plan).sent
    assert set(hub.files(REPO)) == set(plan.files)


def test_a_name_that_is_taken_is_an_error(hub, plan):
    """A 409 for a repository that this user cannot see would end in a traceback."""
    hub.fail("POST", "/api/repos/create", status=409, body={"error": "taken", "url": hub.endpoint + "/" + REPO})
    with pytest.raises(HubFailure, match="me/tiny: the Hub answered 404 .*not see.*Nothing was sent"):
        publish(plan)
    assert hub.repositories == {}


def test_somebody_elses_commit_is_not_mixed_with_ours(hub, plan, published, monkeypatch):
    """Two pushes at once would leave one's weights beside the other's config."""
    create_commit = HfApi.create_commit

    def commit_after_somebody_else(*args, **kwargs):
        repository = hub.repositories[REPO]
        hub.commit(repository, "main", hub.files(REPO) | {"theirs.txt": b"theirs"})
        return create_commit(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", commit_after_somebody_else)
    with pytest.raises(HubFailure, match="412.*somebody else.*has moved from"):
        publish(plan)
    assert hub.files(REPO)["model.safetensors"] == b"older weights"


def test_what_comes_back_changed_is_reported(hub, plan):
    """Weights that were damaged on the way would be published as they are."""
    hub.fail("GET", "/resolve/.*/model.safetensors", flip=True)
    with pytest.raises(VerificationFailed, match=f"model.safetensors.*{plan.files['model.safetensors'].sha256}"):
        publish(plan)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "folder"))


def problems_of(folder: Path, repo_id: str = REPO) -> list[str]:
    with pytest.raises(PushRefused) as refused:
        prepare(folder, repo_id)
    assert all(str(problem) in str(refused.value) for problem in refused.value.problems)
    return [str(problem) for problem in refused.value.problems]


def test_secrets_and_local_paths_are_refused_by_file_and_line(folder, monkeypatch):
    """A token or the layout of a company's disks would be public, for good."""
    monkeypatch.setenv("HF_TOKEN", "an-unusual-token")
    (folder / "notes.md").write_text(
        "fine: https://example.org/home/me/x and home/me/x\n\nfrom /home/me/runs/x here\n"
    )
    (folder / "train.py").write_text(
        "x = 1\nlogin('an-unusual-token')\npassword = 'correct horse'.split()\napi_key='0123456789'\n"
    )
    (folder / "log.json").write_text('{"a": "C:\\\\Users\\\\me\\\\x",\n"t": "hf_' + "a" * 34 + '"}')
    (folder / ".env").write_text("X=1")
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", {"format": "pt", "made_in": "/scratch/me/run"})
    assert sorted(problems_of(folder)) == [
        ".env: a file that holds secrets",
        "log.json:1: a path of a Windows machine, C:\\\\Users\\\\me\\\\x",
        "log.json:2: a Hugging Face token, hf_aaa...",
        "model.safetensors:1: a path of a local machine, /scratch/me/run",
        "notes.md:3: a path of a local machine, /home/me/runs/x",
        "train.py:2: your own Hub token",
        "train.py:4: a secret, api_ke...",
    ]


def test_an_incomplete_card_is_refused_by_line(folder):
    """A page on the Hub would lack what a reader needs, or show a placeholder."""
    card = folder / "README.md"
    text = card.read_text().replace("license: apache-2.0\n", "").replace("A tiny model.", "[More Information Needed]")
    text = text.replace("## Limits\n\nIt is random.\n\n", "").replace("## Training\n\nNot recorded.", "## Training")
    card.write_text(text.replace("## Speed", "![curve](loss.png)\n\n## Speed"))
    lines = card.read_text().splitlines()
    assert problems_of(folder) == [
        "README.md:1: no license in the metadata",
        f"README.md:{lines.index('## Training') + 1}: section 'Training' is empty",
        "README.md: no section 'Limits'",
        f"README.md:{lines.index('[More Information Needed]') + 1}: [More Information Needed] is still to be filled "
        f"in",
        f"README.md:{lines.index('![curve](loss.png)') + 1}: the picture loss.png is not among the files",
    ]
    card.write_text("---\nlicense: [\n---\n")
    assert problems_of(folder)[0].startswith("README.md:1: metadata that the Hub would refuse")
    card.unlink()
    assert problems_of(folder) == ["README.md: missing: make one with `deltanet card`"]


def test_a_card_of_another_repository_is_refused(folder):
    """The example on the page would load somebody else's model."""
    [problem] = problems_of(folder, "me/renamed")
    assert 'from_pretrained("me/renamed"' in problem


def test_weights_that_are_not_whole_are_refused(folder):
    """Weights that lack a tensor, or hold NaN, would load as a random model on the other side."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.linear_attn.q_proj.weight"]
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert problems_of(folder) == [
        "*.safetensors: missing keys: ['model.layers.0.linear_attn.q_proj.weight']",
        "*.safetensors: model.norm.weight holds values that are not finite",
    ]


def test_code_that_is_broken_is_refused(folder):
    """This package's own code would load the folder here, and nobody could load it there."""
    register_remote_code()
    DeltaNetForCausalLM.from_pretrained(folder).save_pretrained(folder)
    code = folder / "delta_rule.py"
    code.write_text(code.read_text() + "\nraise ValueError('broken code')\n")
    [problem] = problems_of(folder)
    assert problem == "config.json: does not load: ValueError: broken code"


def test_pickles_and_leftovers_of_training_do_not_travel(folder):
    """A pickle runs code on the machine of whoever loads it, and training_args.bin names this machine's folders."""
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", ".DS_Store"):
        (folder / name).write_bytes(b"x")
    write_checkpoint(folder / "merged")
    _, left_out, problems, foreign = collect(folder)
    assert not problems and not foreign
    assert set(left_out) == {"training_args.bin", "optimizer.pt", "rng_state_0.pth", ".DS_Store", "merged/"}
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert problems_of(folder) == [
        "pytorch_model.bin: a pickle, which can run code when it is loaded: use safetensors"
    ]


@pytest.fixture
def outside(tmp_path) -> Path:
    """A file of this machine that nobody else should see."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "passwords.txt").write_text("secret")
    return tmp_path / "outside" / "passwords.txt"


def test_a_link_out_of_the_folder_is_refused(folder, outside):
    """A folder from elsewhere, with a link in it, would publish any file of whoever pushes it."""
    (folder / "link.txt").symlink_to(outside)
    (folder / "chain.txt").symlink_to("link.txt")
    (folder / "up.txt").symlink_to(Path("..", "outside", "passwords.txt"))
    (folder / "there_and_back.txt").symlink_to(Path("..", "folder", "config.json"))
    (folder / "nowhere.txt").symlink_to("gone")
    (folder / "loop.txt").symlink_to("pool.txt")
    (folder / "pool.txt").symlink_to("loop.txt")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    (folder / "git.txt").symlink_to(Path(".git", "config"))
    (folder / "notes").mkdir()
    (folder / "notes" / "link.txt").symlink_to(outside)
    (folder / "elsewhere").symlink_to(outside.parent)
    outward = f"a link to {outside}, outside the folder"
    assert sorted(problems_of(folder)) == [
        f"chain.txt: {outward}",
        f"git.txt: a link to the hidden {folder / '.git' / 'config'}",
        f"link.txt: {outward}",
        "loop.txt: a link that leads nowhere",
        f"notes/link.txt: {outward}",
        "nowhere.txt: a link that leads nowhere",
        "pool.txt: a link that leads nowhere",
        f"up.txt: {outward}",
    ]
    assert collect(folder)[1]["elsewhere/"] == "a link to another folder"


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors", "tokenizer_config.json"])
def test_no_link_is_read_either(folder, outside, name):
    """What the error says, or how long it takes, would tell about the file that the link leads to."""
    (folder / name).unlink()
    (folder / name).symlink_to(outside)
    assert problems_of(folder) == [f"{name}: a link to {outside}, outside the folder"]


@pytest.mark.parametrize("name", ["README.md", "pipe.txt", "tokenizer_config.json", "config.json"])
def test_a_pipe_is_refused_and_not_waited_for(folder, name):
    """The push would hang for ever."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert problems_of(folder) == [f"{name}: neither a file nor a link to one"]


def test_a_name_that_cannot_be_shown_is_refused(folder):
    """A list of files with a line break, or with bytes that are no text, in one of them would be misread."""
    (folder / "a\nb.txt").write_text("x")
    Path(os.fsdecode(bytes(folder) + b"/\xff.txt")).write_text("x")
    assert problems_of(folder) == [
        "'a\\nb.txt': a name that cannot be shown",
        "'\\udcff.txt': a name that cannot be shown",
    ]


def test_a_snapshot_of_the_hubs_cache_can_be_published(hub, plan, tmp_path):
    """What was downloaded consists of links into the cache's blobs: nobody could publish a copy of it."""
    publish(plan)
    snapshot = Path(snapshot_download(REPO, cache_dir=tmp_path / "cache", endpoint=hub.endpoint))
    assert (snapshot / "config.json").is_symlink()
    assert set(collect(snapshot)[0]) == set(plan.files)
    (tmp_path / "short").symlink_to(snapshot)
    again = prepare(tmp_path / "short", REPO)
    assert {name: x.sha256 for name, x in again.files.items()} == {name: x.sha256 for name, x in plan.files.items()}


def test_only_this_caches_blobs_are_its_own(folder, outside, tmp_path):
    """A folder that calls itself a snapshot could bring a link to somebody's files as its blobs."""
    for cache in ("models--me--x", "models--me--y", "no-cache"):
        (tmp_path / cache / "snapshots").mkdir(parents=True)
        (tmp_path / cache / "blobs").mkdir()
        (tmp_path / cache / "blobs" / "1").write_text("x")
    snapshot = shutil.move(folder, tmp_path / "models--me--x" / "snapshots" / "1")
    (snapshot / "own.txt").symlink_to(Path("..", "..", "blobs", "1"))
    (snapshot / "other.txt").symlink_to(tmp_path / "models--me--y" / "blobs" / "1")
    assert [str(p).split(":")[0] for p in collect(snapshot)[3]] == ["other.txt"]
    (tmp_path / "models--me--x" / "blobs" / "1").unlink()
    (tmp_path / "models--me--x" / "blobs" / "1").symlink_to(outside)
    assert [str(p).split(":")[0] for p in collect(snapshot)[3]] == ["other.txt", "own.txt"]
    shutil.rmtree(tmp_path / "models--me--x" / "blobs")
    (tmp_path / "models--me--x" / "blobs").symlink_to(outside.parent)
    (snapshot / "passwords.txt").symlink_to(Path("..", "..", "blobs", "passwords.txt"))
    assert "passwords.txt" in {p.file for p in collect(snapshot)[3]}
    moved = shutil.move(snapshot, tmp_path / "no-cache" / "snapshots" / "1")
    assert {p.file for p in collect(moved)[3]} == {"other.txt", "own.txt", "passwords.txt"}


def test_code_of_other_repositories_is_not_run(folder):
    """Loading the folder, here and by everybody after, would run code that is not in it and can change any day."""
    for reference in ("../../x--tokenization.Tokenizer", "them/theirs--tokenization.Tokenizer", "../x.Tokenizer"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [reference, None]}}))
        [problem] = problems_of(folder)
        assert problem == f"tokenizer_config.json: auto_map leads to {reference!r}, not to code in this folder"
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [{}]}}))
    with pytest.raises(ValueError, match="tokenizer_config.json has auto_map .*does not name classes"):
        prepare(folder, REPO)


@pytest.mark.parametrize(
    "reference", ["../../x--mod.Class", "them/theirs--mod.Class", "them--mod.Class", "../mod.Class"]
)
def test_another_repositorys_model_code_gives_way_to_ours(folder, reference):
    """A file that is named like another repository's code would make the push run that repository's code."""
    (folder / "them--mod.py").write_text("class Class: pass")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": reference}}))
    code = _missing_code(folder)
    assert set(code) == CODE | {"config.json"}
    assert (
        json.loads(code["config.json"])["auto_map"]["AutoModelForCausalLM"] == "modeling_deltanet.DeltaNetForCausalLM"
    )
    for auto_map in (["modeling_deltanet.DeltaNetForCausalLM"], {"AutoConfig": 3}, "x"):
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
        with pytest.raises(ValueError, match="config.json has auto_map .*does not name classes"):
            _missing_code(folder)


def test_names_in_files_do_not_lead_out_of_the_folder(folder, outside):
    """The push would load weights or a tokenizer from elsewhere on this machine, and publish a folder without them."""
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../outside/x.safetensors"}}))
    with pytest.raises(ValueError, match="index.json names '../outside/x.safetensors'"):
        prepare(folder, REPO)
    index.unlink()
    (folder / "tokenizer_config.json").write_text('{"fast_tokenizer_files": ["../outside/tokenizer.1.0.json"]}')
    with pytest.raises(ValueError, match="tokenizer_config.json names '../outside/tokenizer.1.0.json'"):
        prepare(folder, REPO)


@pytest.mark.parametrize("base", ["../x", "./x", "~/x", "owner/name/more", "a/b\nlicense: mit", "a/b)[x", 3, None])
def test_a_base_that_is_no_repository_is_refused(tmp_path, base):
    """A path, or Markdown of somebody else's choice, would stand as the base on the adapter's page."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    assert any(p.startswith("adapter_config.json: its base is") for p in problems_of(tmp_path))
    with pytest.raises(ValueError, match="no repository of the Hub"):
        make_card(tmp_path, REPO)


def test_what_is_no_deltanet_is_refused(tmp_path):
    """Another architecture's folder would be given DeltaNet's code."""
    with pytest.raises(ValueError, match="neither a config.json nor"):
        prepare(tmp_path, REPO)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama', not 'deltanet'"):
        prepare(tmp_path, REPO)
    with pytest.raises(ValueError, match="owner/name"):
        prepare(tmp_path, "tiny")


def test_the_command_line_answers_by_exit_code(hub, plan, folder, monkeypatch):
    """A script that publishes could not tell a refusal from a failure of the Hub, or from success."""
    app = typer.Typer()
    register(app)

    def run(*arguments):
        return CliRunner().invoke(app, ["push", str(folder), *arguments])

    (folder / "README.md").unlink()
    refused = run(REPO, "--json")
    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["problems"] == [
        {"file": "README.md", "line": None, "what": "missing: make one with `deltanet card`"}
    ]

    module = importlib.import_module("deltanet_conversion.push")
    monkeypatch.setattr(module, "prepare", lambda *args, **kwargs: plan)
    dry = run(REPO, "--dry-run", "--json")
    assert dry.exit_code == 0
    assert json.loads(dry.stdout)["changes"]["new"] == list(plan.files)
    assert "model.safetensors" in run(REPO, "--dry-run").stdout
    assert hub.repositories == {}
    with monkeypatch.context() as patch:  # without a network the folder can still be looked at
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        dry = run(REPO, "--dry-run", "--json")
        assert dry.exit_code == 0 and json.loads(dry.stdout)["changes"] is None
        assert dry.stderr.startswith("Not compared with the Hub: ") and len(dry.stderr.splitlines()) == 1
        assert run(REPO).exit_code == 3

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    failed = run(REPO)
    assert failed.exit_code == 3
    assert "401" in failed.stderr
    assert "hf_wrong" not in failed.stderr
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail("GET", "/resolve/.*/config.json", flip=True)
    assert run(REPO).exit_code == 4
    assert run(REPO, "--unknown").exit_code == 2
