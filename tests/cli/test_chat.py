from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.cli.test_generate import mlxquant
from tests.tiny import make


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("cli") / "qwen3", "qwen3")


def test_lines_of_a_pipe_are_turns(model, tmp_path):
    saved = tmp_path / "chat.json"
    lines = ["Hello", "", "Again \\", "and again", "/stats", "/system Be brief", f"/save {saved}", "/help"]
    found = mlxquant("chat", model, "-n", "4", "--stats", stdin="\n".join(lines) + "\n")
    assert found.returncode == 0, found.stderr
    chat = json.loads(saved.read_text())
    assert [m["content"] for m in chat["messages"] if m["role"] == "user"] == ["Hello", "Again \nand again"]
    assert [m["content"] for m in chat["messages"] if m["role"] == "assistant"] == _answers(found.stdout, chat)
    assert chat["system"] == "Be brief"
    assert "more reused" in found.stderr
    assert "2 answers | cache" in found.stderr
    assert "/exit" in found.stderr


def _answers(stdout, chat):
    said = [m["content"] for m in chat["messages"] if m["role"] == "assistant"]
    assert stdout == "".join(f"{text}\n" for text in said)
    return said


def test_a_chat_can_be_loaded_and_reset(model, tmp_path):
    saved = tmp_path / "chat.json"
    mlxquant("chat", model, "-n", "4", stdin=f"Hello\n/save {saved}\n")
    first = json.loads(saved.read_text())
    found = mlxquant(
        "chat", model, "-n", "4", stdin=f"/load {saved}\nMore\n/save {saved}\n/reset\nHello\n/exit\nnever\n"
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(saved.read_text())["messages"][:2] == first["messages"]
    assert found.stdout.endswith(first["messages"][1]["content"] + "\n"), "after /reset the first answer comes again"


def test_a_failed_command_is_told_and_the_chat_goes_on(model):
    found = mlxquant("chat", model, "-n", "2", stdin="/nope\n/load\n/load no.json\nHello\n/stats\n")
    assert found.returncode == 1, "a script must learn of it"
    assert found.stderr.count("Error:") == 3
    assert "1 answer |" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_full_context_is_told_with_a_next_step(model, tmp_path):
    found = mlxquant("chat", model, "--context", "24", "--temp", "5", "--seed", "1", stdin="Hello\nMore\n")
    assert "(cut: the context of 24 tokens is full; /reset forgets all; or /save it" in found.stderr
    assert "Error: with this question the conversation has" in found.stderr
    assert found.returncode == 1
    found = mlxquant("chat", model, "-n", "2", "--temp", "5", "--seed", "1", stdin="Hello\n")
    assert "(cut after --max-tokens 2)" in found.stderr


def test_a_cache_of_fixed_size_has_room_for_what_the_model_was_made_for(model, tmp_path):
    folder = tmp_path / "long"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20000}))
    long = {"role": "user", "content": "word " * 3500}
    chat = {"format": "mlxquant-chat-1", "messages": [long, {"role": "assistant", "content": "b"}]}
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    lines = f"/load {tmp_path / 'chat.json'}\nHello\n"
    assert "the context 8192" in mlxquant("chat", folder, "-n", "1", stdin=lines).stderr
    found = mlxquant("chat", folder, "-n", "1", "--max-kv-size", "64", stdin=lines)
    assert found.returncode == 0, found.stderr


def test_a_chat_with_another_model_is_told(model, tmp_path):
    saved = tmp_path / "chat.json"
    found = mlxquant("chat", model, stdin=f"/save {saved}\n/load {saved}\n/save ~no-such-user/x\n")
    assert "They were held" not in found.stderr
    assert "no such user" in found.stderr
    saved.write_text(saved.read_text().replace("qwen3", "other"))
    assert "They were held with other." in mlxquant("chat", model, stdin=f"/load {saved}\n").stderr


def test_the_models_own_sampling_is_used_told_and_overridden(model, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    own = {"do_sample": True, "temperature": 5.0, "top_k": 100}
    (folder / "generation_config.json").write_text(json.dumps(own))

    def said(command, *options):
        stdin = "Hello\n" if command == "chat" else ""
        return mlxquant(command, folder, "-n", "8", "--seed", "1", *options, stdin=stdin)

    greedy = said("generate", "-p", "Hello").stdout
    assert "sampling: temperature 5, top_k 100" in said("chat").stderr
    assert said("chat").stdout != greedy
    assert said("chat", "--temp", "0").stdout == greedy
    assert "sampling: the most likely token" in said("chat", "--temp", "0").stderr


def test_bytes_that_are_no_utf8_are_refused_in_one_line(model):
    found = subprocess.run(
        [sys.executable, "-m", "mlxquant", "chat", str(model), "-n", "2"],
        input=b"caf\xe9\nHello\n", capture_output=True, check=False,
    )  # fmt: skip
    assert found.returncode == 1
    assert b"Error: no UTF-8 after 'caf'" in found.stderr
    assert b"Traceback" not in found.stderr


def test_ctrl_c_ends_the_answer_and_keeps_the_chat(model, tmp_path):
    saved = tmp_path / "chat.json"
    # Ends only by its own weight: 1500 tokens take much longer than the signal.
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "mlxquant", "chat", str(model), "--temp", "5", "--seed", "1", "-n", "1500"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0,
    )  # fmt: skip
    process.stdin.write("Hello\n")
    process.stdin.flush()
    process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(f"/save {saved}\n", timeout=120)
    assert process.returncode == 0, errors
    assert "(stopped)" in errors
    assert [m["role"] for m in json.loads(saved.read_text())["messages"]] == ["user", "assistant"]


def test_on_a_terminal_it_prompts_and_draws(model):
    """A pseudo-terminal: the prompt, an answer through rich, and Ctrl-D to leave."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxquant", "chat", str(model), "-n", "3"],
        stdin=child, stdout=child, stderr=child, env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(child)
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen and select.select([parent], [], [], max(end - time.monotonic(), 0))[0]:
            try:
                seen += os.read(parent, 4096)
            except OSError:  # the other side has closed: what Linux says at the end of a terminal
                break
        assert text in seen, seen
        seen = seen.partition(text)[2]

    wait_for(b"/help lists the commands")
    wait_for(b"> ")
    os.write(parent, b"/stats\n")
    wait_for(b"No answer yet.")
    os.write(parent, b"Hello\n/stats\n")
    wait_for(b"1 answer |")
    wait_for(b"> ")
    os.write(parent, b"half a question")
    wait_for(b"half a question")
    time.sleep(1)  # input() heeds a signal while it waits for a key, not while it echoes one
    process.send_signal(signal.SIGINT)
    wait_for(b"Ctrl-D or /exit leaves")
    wait_for(b"> ")
    os.write(parent, b"\x04")
    process.wait(timeout=60)
    os.close(parent)
    assert process.returncode == 0, seen


def test_base_model_is_refused_before_its_weights_are_read(tmp_path):
    folder = make(tmp_path / "m", "llama")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template")
    path.write_text(json.dumps(config))
    found = mlxquant("chat", folder, stdin="Hello\n")
    assert found.returncode == 1
    assert "base model" in found.stderr
    assert "--no-template" in found.stderr
