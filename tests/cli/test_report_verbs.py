"""`excise evaluate`, `table` and `report` from the command line."""

import json

from tests.report.folders import full_folder, run_folder
from tests.tiny import tiny_folder

from excise.artefacts import read_json


def test_a_run_is_judged_beside_its_original_and_its_card_says_so(excise, tmp_path):
    original, run = tiny_folder(tmp_path / "original", layers=3), tmp_path / "run"
    run_folder(run, name=str(original))
    tiny_folder(run / "model", layers=2, seed=1)
    (run / "model" / "excise.json").write_text(json.dumps({"removed": [1], "original": str(original)}))
    (run / "model" / "README.md").write_text("---\ntags:\n- excise\n---\n# small\n")
    text = tmp_path / "text.txt"
    text.write_text("A stack of blocks loses a few of them and still speaks. " * 9)
    options = ["--perplexity", text, "--window", 32, "--speed", "--prompt-tokens", 8, "--new-tokens", 3]
    code, out, err = excise("evaluate", run, "--with-original", *options, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found == read_json(run / "scores.json")
    assert [(r["kind"], r["name"]) for r in found["results"]] == 2 * [("perplexity", "text.txt"), ("speed", "speed")]
    assert sorted(len(m["removed"]) for m in found["models"].values()) == [0, 1]
    card = (run / "model" / "README.md").read_text()
    assert "model-index" in card
    assert "## Spectrum" in card
    code, out, _ = excise("evaluate", run, "--with-original", *options)
    assert code == 0
    assert "perplexity" in out


def test_the_panel_of_a_checkpoint_is_beside_its_original_and_made_once(excise, tmp_path):
    original, pruned = tmp_path / "original", tmp_path / "pruned"
    tiny_folder(original, layers=4, max_position_embeddings=4096)
    assert excise("prune", original, "--removed", 1, "--out", pruned, "--no-self-test")[0] == 0
    command = ("evaluate", pruned, "--panel", "--limit", 1, "--out", tmp_path / "scores.json")
    code, out, err = excise(*command, "--json")
    assert code == 0, err
    written = read_json(tmp_path / "panel.json")
    assert json.loads(out)["panel"] == written
    assert [model["removed"] for model in written["models"]] == [[], [1]]
    assert not (tmp_path / "scores.json").exists()
    made = (tmp_path / "panel.json").stat().st_mtime_ns
    code, out, _ = excise(*command)
    assert "tool call" in out
    assert "retrieval" in out
    assert (tmp_path / "panel.json").stat().st_mtime_ns == made
    # Another number of questions, another model, or the wish for it.
    for other in ((*command, "--limit", 2), (*command, "--against", pruned), (*command, "--force")):
        assert excise(*other)[0] == 0
        assert (tmp_path / "panel.json").stat().st_mtime_ns > made
        made = (tmp_path / "panel.json").stat().st_mtime_ns
    assert {path.name for path in tmp_path.iterdir()} == {"original", "pruned", "panel.json"}
    # The card says so at once, and goes on saying so when scores are added.
    assert "## Capabilities" in (pruned / "README.md").read_text()
    (tmp_path / "text.txt").write_text("A stack of blocks loses a few of them and still speaks. " * 9)
    scored = ("--perplexity", tmp_path / "text.txt", "--window", 32, "--out", tmp_path / "scores.json")
    assert excise("evaluate", pruned, *scored)[0] == 0
    card = (pruned / "README.md").read_text()
    assert card.count("## Capabilities") == card.count("## Scores") == 1


def test_a_panel_needs_an_original(excise, tmp_path):
    original = tiny_folder(tmp_path / "original", layers=2)
    code, _, err = excise("evaluate", original, "--panel")
    assert code == 2
    assert "nothing tells which; name it with --against ORIGINAL" in err
    assert "--against names the panel's original; it needs --panel" in excise("evaluate", original, "--against", "x")[2]


def test_what_is_asked_wrongly_is_told(excise, tmp_path):
    assert "nothing to evaluate" in excise("evaluate", tmp_path)[2]
    assert "TASK=METRIC" in excise("table", tmp_path, "--metric", "hellaswag")[2]
    assert "--which" in excise("table", tmp_path, "--which", "3")[2]
    assert "nothing to report" in excise("report", tmp_path)[2]
    code, _, err = excise("report", tmp_path / "absent")
    assert code == 2
    assert "no folder" in err


def test_tables_and_page_come_from_one_folder(excise, tmp_path):
    full_folder(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("---\ntags:\n- excise\n---\n# small\n")
    code, out, _ = excise("table", tmp_path, "--which", "2", "--format", "csv")
    assert code == 0
    assert out.startswith("# br,model,method,blocks removed\n")
    assert excise("table", tmp_path)[1].count("| # br |") == 2
    code, out, _ = excise("report", tmp_path)
    assert code == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert (tmp_path / "figures" / "damage_against_budget.svg").exists()
    assert "## Spectrum" in (tmp_path / "model" / "README.md").read_text()


def test_tables_and_page_answer_in_json(excise, tmp_path):
    full_folder(tmp_path)
    found = json.loads(excise("table", tmp_path, "--json")[1])
    rows = [row for row in found["removals"] if row["removed"] == 3 and row["method"] == "norm-ratio"]
    assert {row["model"] for row in rows} == {"org/model"}
    assert any(row["method"] == "org/model" and row["cells"]["arc_easy"]["value"] for row in found["scores"])
    found = json.loads(excise("report", tmp_path, "--json")[1])
    assert found["report"] == str(tmp_path / "report.html")
    assert found["figures"]["capabilities"] == "figures/capabilities.svg"
    assert found["cards"] == []


def test_published_numbers_stand_beside_a_run(excise, tmp_path):
    run_folder(tmp_path, budget=8, name="meta-llama/Llama-3.1-8B-Instruct")
    code, out, err = excise("table", tmp_path, "--beside", "paper")
    assert code == 0, err
    assert "| 8 | meta-llama/Llama-3.1-8B-Instruct | CBO: 0 | fisher:0 | 0.64 |  |" in out
    found = json.loads(excise("table", tmp_path, "--beside", "paper", "--json")[1])["beside"]
    assert {"BI (Men et al., 2025)", "CBO: 0"} <= {pair["paper"]["method"] for pair in found if pair["paper"]}
    assert "--beside" in excise("table", tmp_path, "--beside", "journal")[2]


def test_a_page_of_others_stops_a_run_before_it_begins(excise, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "work").mkdir()
    (tmp_path / "run" / "report.html").write_text("<html>years of work</html>")
    status, _, err = excise("run", tiny_folder(tmp_path / "model"), "--remove", 1, "--out", tmp_path / "run")
    assert (status, "report.html exists and is no page of excise" in err) == (2, True)
