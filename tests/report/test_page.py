"""The page: complete in itself, whole where data are there, silent where they are not, hostile text escaped."""

import json
import re
from html.parser import HTMLParser

import pytest

from excise.artefacts import read_json, write_json
from excise.choosing.verify import Candidate
from excise.errors import InputError, OutputError
from excise.ising.spectrum import Spectrum, State
from excise.report.material import gather
from excise.report.page import render, write_page
from excise.report.sections import SECTIONS
from excise.report.sections.couplings import shown_energy
from excise.report.sections.damage import damage_rows
from excise.report.sections.prediction import group_of, spearman
from excise.report.sections.refinement import predictions
from tests.report.folders import HOSTILE, SPEED, add_panel, add_spectra, full_folder, gradients, run_folder

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Outline(HTMLParser):
    """Tags in order, open ones, ids and scripts."""

    def __init__(self):
        super().__init__()
        self.stack, self.ids, self.scripts, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.scripts[-1] += data


def outline(page):
    parser = Outline()
    parser.feed(page)
    assert parser.stack == []
    assert len(parser.ids) == len(set(parser.ids))
    return parser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs") / "run"
    full_folder(place)
    return place


@pytest.fixture(scope="module")
def page(folder):
    return render(gather(folder))


def test_every_section_is_there_and_none_is_said_to_be_missing(page):
    ids = outline(page).ids
    assert [section.name for section in SECTIONS if section.name in ids] == [section.name for section in SECTIONS]
    assert "absent" not in ids


def test_it_refers_to_nothing_outside_itself(page):
    for tag, name, value in outline(page).attributes:
        if name in ("src", "href", "action", "srcset"):
            assert value.startswith(("data:", "#")), (tag, name, value)
    # Namespaces are names, not addresses to fetch.
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert len(page.encode()) < 6e6


def test_what_the_script_shows_is_what_the_files_say(folder, page):
    facts = json.loads((folder / "run.json").read_text())
    data = json.loads(outline(page).scripts[0])
    assert data["budgets"] == [1, 2, 3, 4, 5]
    assert data["runs"][0]["removed"] == facts["removed"]
    view = next(view for view in data["views"] if view["budget"] == 3)
    spectrum = json.loads((folder / "spectrum-fisher.json").read_text())
    assert view["states"] == spectrum["states"]
    assert data["measured"]["3"][0]["delta"] == min(c["delta"] for c in facts["candidates"])


def test_the_matrix_is_the_energys(folder, page):
    data = json.loads(outline(page).scripts[1])
    energy = gather(folder).energies["fisher"]
    assert data["n"] == 12
    assert len(data["values"]) == 12 * 13 // 2
    assert data["values"][0] == pytest.approx(energy.J[0, 0], rel=1e-3)
    assert data["values"][13] == pytest.approx(energy.J[1, 2], rel=1e-3)
    assert data["correlations"][1] == pytest.approx(energy.correlation()[0, 1], rel=1e-3)


def test_speed_stands_as_predicted_and_as_measured(page):
    part = page[page.index('id="speed"') :]
    assert "asked for: --speedup 1.3" in part
    row = part[part.index("a token decoded") :]
    assert re.findall(r"<td>([^<]+)</td>", row)[:3] == ["1.35", "1.25", "+8.0%"]


def test_what_was_not_timed_is_said_to_be_not_measured(tmp_path):
    run_folder(tmp_path / "run", speed={**SPEED, "measured": None})
    part = render(gather(tmp_path / "run"))
    row = part[part.index("a token decoded") :]
    assert re.findall(r"<td>([^<]*)</td>", row)[:3] == ["1.35", "not measured", ""]


def test_missing_data_leave_a_line_with_the_command(tmp_path):
    add_spectra(tmp_path, range(2, 4))
    page = render(gather(tmp_path))
    parsed = outline(page)
    assert "removal" in parsed.ids
    for section in SECTIONS:
        if section.name not in parsed.ids:
            assert section.missing[0] in page
    for absent in ("prediction", "damage", "benchmarks", "healing", "couplings"):
        assert absent not in parsed.ids


def test_scores_alone_make_a_page(folder, tmp_path):
    (tmp_path / "scores.json").write_text((folder / "scores.json").read_text())
    assert {"benchmarks", "provenance", "absent"} <= set(outline(render(gather(tmp_path))).ids)


def test_hostile_text_is_shown_and_never_run(tmp_path):
    facts = full_folder(tmp_path, name=HOSTILE)
    facts["candidates"][0]["method"] = facts["proposed_by"][0] = HOSTILE
    (tmp_path / "run.json").write_text(json.dumps(facts))
    for name in ("compare.json", "scores.json", "healed/heal.json"):
        path = tmp_path / name
        write_json(path, json.loads(json.dumps(read_json(path)).replace("norm-ratio", json.dumps(HOSTILE)[1:-1])))
    page = render(gather(tmp_path))
    assert "<script>alert" not in page
    assert "alert(&#39;x&#39;)" in page
    scripts = outline(page).scripts
    assert len(scripts) == 3  # two of data, one that runs
    assert json.loads(scripts[0])["measured"]["3"][0]["methods"][0] == HOSTILE


def test_every_figure_has_a_name_and_numbers_behind_it(page):
    parsed = outline(page)
    charts = [value for tag, name, value in parsed.attributes if tag == "svg" and name == "role"]
    labels = [value for tag, name, value in parsed.attributes if tag == "svg" and name == "aria-label"]
    assert len(charts) == len(labels) > 6
    assert all(labels)
    assert page.count("<summary>Numbers</summary>") >= 6


def test_the_page_is_written_into_the_folder_or_elsewhere(folder, tmp_path, page):
    assert write_page(gather(folder)) == folder / "report.html"
    assert (folder / "report.html").read_text() == page
    assert write_page(gather(folder), tmp_path / "x.html").read_text() == page


def test_the_correlation_is_spearmans_over_distinct_removals(folder):
    facts = json.loads((folder / "run.json").read_text())
    candidates = [Candidate(**{**c, "removed": tuple(c["removed"])}) for c in facts["candidates"]]
    distinct = list({c.removed: (c.energy, c.loss) for c in candidates}.values())
    ranks = [[sorted(values).index(v) for v in values] for values in zip(*distinct, strict=True)]
    n, squares = len(distinct), sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    assert spearman(gather(folder).measured[3]) == pytest.approx(1 - 6 * squares / (n * (n**2 - 1)))
    assert spearman(gather(folder).measured[3][:2]) is None


def test_removals_are_grouped_by_who_proposed_them(folder):
    groups = {m.methods: group_of(m, "fisher") for m in gather(folder).measured[3]}
    for methods, group in groups.items():
        expected = "random" if all(m.startswith("random") for m in methods) else "states of the energy"
        assert group == expected
    other = gather(folder).measured[3][0]
    assert {group_of(other, "another")} <= {"other energies and refinement", "random"}


def test_damage_of_runs_stands_in_for_a_comparison(tmp_path):
    for budget in (2, 3):
        run_folder(tmp_path / str(budget), budget=budget)
    rows = damage_rows(gather(tmp_path))
    assert {row["remove"] for row in rows} == {2, 3}
    assert "against the number of removed blocks" in render(gather(tmp_path))


def test_predictions_of_a_refinement_are_those_made_before_measuring(folder):
    loop, random = predictions(gather(folder).refined[3])
    assert loop == [(0.4, 0.5)]  # the other's measured damage is infinite
    assert random == [(2.9, 3.1), (0.9, 0.8)]


def test_the_race_tells_the_worst_domain_of_finalists(tmp_path):
    full_folder(tmp_path)
    path = tmp_path / "refined" / "candidates.json"
    content = json.loads(path.read_text())
    assert "verse +0.75" not in render(gather(tmp_path))
    content["budgets"]["3"]["finalists"][0]["domains"] = {"verse": 0.75, "a|b<i>": 0.5, "lost": None}
    path.write_text(json.dumps(content))
    assert "verse +0.75" in render(gather(tmp_path))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda found: found.update(many=found.pop("3")), "numbers of removed blocks"),
        (lambda found: found["3"].update(finalists=[{"removed": [1]}]), "finalists"),
        (lambda found: found["3"]["rounds"][0].update(predicted=[0.1]), "one of each"),
        (lambda found: found["3"].update(anchors=[[0.1]]), "as pairs"),
        (lambda found: found["3"].update(measured=[{"removed": "1-2"}]), "measured"),
    ],
)
def test_a_refinement_that_someone_edited_is_refused_by_name(tmp_path, edit, said):
    full_folder(tmp_path)
    path = tmp_path / "refined" / "candidates.json"
    content = json.loads(path.read_text())
    edit(content["budgets"])
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"candidates\.json.*{said}"):
        gather(tmp_path)


def test_a_run_by_a_fitted_energy_shows_that_ones_couplings(tmp_path):
    facts = full_folder(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({**facts, "energy": "fitted"}))
    name, _ = shown_energy(gather(tmp_path))
    assert name == "fitted-3"


def test_128_blocks_stay_light(tmp_path):
    gradients(128).save(tmp_path / "gradients.safetensors")
    spectra = []
    for budget in range(1, 128):
        starts = range(min(20, 129 - budget))
        found = tuple(State(tuple(range(k, k + budget)), float(k)) for k in starts)
        spectra.append(Spectrum(found, 128, budget, "none", 0.0).to_json())
    (tmp_path / "spectra-fisher.json").write_text(json.dumps({"spectra": spectra}))
    page = render(gather(tmp_path))
    outline(page)
    assert len(page.encode()) < 6e6


def test_repair_and_healing_are_among_the_first_facts(tmp_path):
    facts = run_folder(tmp_path)
    loss = facts["pruned_loss"]
    told = {
        "checkpoint_loss": loss - 0.1,
        "healed": {"checkpoint": "healed", "losses": {"original": 3.0, "pruned": loss - 0.1, "healed": loss - 0.2}},
    }
    (tmp_path / "run.json").write_text(json.dumps({**facts, **told}))
    page = render(gather(tmp_path))
    after = loss - 0.1 - 3
    assert f"+{after:.3f} [+{after - 1.96 * 0.02:.3f}, +{after + 1.96 * 0.02:.3f}]" in page
    assert f"loss {loss - 0.1:.3f}, was 3.000, on held-out text by which nothing was chosen" in page
    assert f"+{loss - 3:.3f} before repair" in page
    assert "Damage after healing" in page
    assert f"loss {loss - 0.2:.3f} nats/token" in page


def test_the_headline_says_in_words_who_found_it(tmp_path):
    facts = run_folder(tmp_path)
    told = {"proposed_by": ["refined:3", "fitted:2"], "certified": {"fitted": True}}
    (tmp_path / "run.json").write_text(json.dumps({**facts, **told}))
    page = render(gather(tmp_path))
    words = "found by refinement, proved third lowest of its energy"
    assert f"<strong>{words}</strong><span>for its least measured damage; by name refined:3, fitted:2</span>" in page
    assert json.loads(outline(page).scripts[0])["runs"][0]["said"] == words


def test_what_won_after_repair_comes_first_with_its_damage_after_it(tmp_path):
    facts = run_folder(tmp_path, repaired=True)
    assert facts["removed"] != facts["candidates"][0]["removed"]
    first, second, *others = json.loads(outline(render(gather(tmp_path))).scripts[0])["measured"]["3"]
    assert first["removed"] == facts["removed"]
    assert first["repaired"] == pytest.approx(facts["checkpoint_loss"] - 3.0)
    assert second["repaired"] == pytest.approx(second["delta"] - 0.01)
    assert all(other["repaired"] is None for other in others)


def test_folders_of_whoever_ran_it_stay_out_of_the_page(tmp_path):
    facts = run_folder(tmp_path, name="/home/someone/llama")
    facts["calibration"]["data"] = "/home/someone/chats.jsonl:2,starter"
    facts["provenance"]["command"] = "excise run /home/someone/llama --remove 3 --out /home/someone/small"
    (tmp_path / "run.json").write_text(json.dumps(facts))
    page = render(gather(tmp_path))
    assert "someone" not in page
    assert "excise run llama --remove 3 --out small" in page
    assert "chats.jsonl:2,starter: 60 samples" in page


def test_damage_stands_with_its_error_by_domain_and_with_what_tied(tmp_path):
    facts = run_folder(tmp_path)
    assert "Not told apart" not in render(gather(tmp_path))
    domains = {"domains": {"verse": 0.9, "news": 0.4}, "pruned_domains": {"verse": 1.2, "news": 0.7}}
    first = {"removed": [1, 2], "delta": 0.5, "worst_domain": 0.9}
    tied = [first, {"removed": [4, 7], "delta": 0.52, "worst_domain": 1.1}]
    told = {"damage": {"error": 0.021, **domains}, "choice": {"base_loss": 3.0, "tied": tied}}
    (tmp_path / "run.json").write_text(json.dumps({**facts, **told}))
    page = render(gather(tmp_path))
    for text in ("95 % interval", "verse", "+1.200", "+0.900", "4,7", "+1.100", "Not told apart"):
        assert text in page


def test_only_a_page_is_replaced(folder, tmp_path):
    material = gather(folder)
    first = write_page(material, tmp_path / "page.html")
    assert write_page(material, tmp_path / "page.html").read_bytes() == first.read_bytes()
    (tmp_path / "thesis.html").write_text("<html>years of work</html>")
    (tmp_path / "folder").mkdir()
    for name, message in (("thesis.html", "no page of excise"), ("folder", "is a folder")):
        with pytest.raises(OutputError, match=message):
            write_page(material, tmp_path / name)
    assert (tmp_path / "thesis.html").read_text() == "<html>years of work</html>"


def test_capabilities_stand_beside_the_originals_and_answers_side_by_side(tmp_path):
    run_folder(tmp_path)
    add_panel(tmp_path, said=HOSTILE)
    page = render(gather(tmp_path))
    outline(page)
    assert "<td>75 % [65 %, 85 %]</td><td>25 % [15 %, 35 %] ▼</td>" in page
    assert "<td>50 % [40 %, 60 %]</td><td>55 % [45 %, 65 %]</td>" in page
    assert "<td></td><td>0.4 [0.3, 0.5]</td>" in page
    assert page.count("Question 0 of") == page.count("Question 1 of") == 2
    assert "Question 2 of" not in page
    assert page.count("run/model, failed") == 4
    assert "<script>alert" not in page


@pytest.mark.parametrize("part", ["models", "rows", "exchanges"])
def test_a_panel_of_another_kind_is_refused(tmp_path, part):
    run_folder(tmp_path)
    add_panel(tmp_path)
    facts = json.loads((tmp_path / "panel.json").read_text())
    (tmp_path / "panel.json").write_text(json.dumps({**facts, part: [{"name": 3}]}))
    with pytest.raises(InputError, match=r"panel\.json"):
        gather(tmp_path)
