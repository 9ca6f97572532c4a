"""The chat page: Instant and Expert, profiles with a model, thinking and settings of their own."""

from typing import Any

import pytest
from playwright.sync_api import expect

MODELS = ("deepseek-v4-flash", "deepseek-v4-pro")


@pytest.fixture
def two_models(tab: Any) -> Any:
    tab.page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": name} for name in MODELS]}))
    tab.page.reload()
    return tab


def choose(tab: Any, name: str) -> None:
    tab.page.locator("#profiles").get_by_text(name).click()


def ask(tab: Any, text: str) -> dict[str, Any]:
    answers = tab.page.locator(".assistant").count()
    tab.ask(text, ["ok"])
    expect(tab.page.locator(".assistant")).to_have_count(answers + 1)
    tab.wait("done")
    return tab.mock.requests[-1]


def test_each_profile_has_its_own_model_thinking_and_settings(two_models: Any) -> None:
    tab, page = two_models, two_models.page
    page.locator(".segments").get_by_text("Max").click()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_role("dialog", name="Settings for Expert")).to_be_visible()
    page.get_by_label("System prompt").fill("Prove it.")
    page.locator("#top-p").fill("0.5")
    page.get_by_role("button", name="Done").click()
    expert = ask(tab, "one")
    assert expert["model"] == "deepseek-v4-pro" and expert["reasoning_effort"] == "max" and expert["top_p"] == 0.5
    assert expert["messages"][0] == {"role": "system", "content": "Prove it."}

    choose(tab, "Instant")
    expect(page.get_by_label("Model", exact=True)).to_have_value("deepseek-v4-flash")
    expect(page.get_by_role("switch", name="DeepThink")).to_have_attribute("aria-checked", "false")
    instant = ask(tab, "two")
    assert instant["model"] == "deepseek-v4-flash" and instant["thinking"] == {"type": "disabled"}
    assert instant["messages"][0]["role"] == "user" and "top_p" not in instant
    page.get_by_role("switch", name="DeepThink").click()
    page.get_by_label("Model", exact=True).select_option("deepseek-v4-pro")

    page.reload()  # both are remembered, and the chat's profile with it
    expect(page.get_by_role("radio", name="Instant")).to_be_checked()
    instant = ask(tab, "three")
    assert (instant["model"], instant["reasoning_effort"]) == ("deepseek-v4-pro", "high")
    choose(tab, "Expert")
    assert ask(tab, "four")["reasoning_effort"] == "max"


def test_a_chat_keeps_its_profile(tab: Any) -> None:
    page = tab.page
    choose(tab, "Instant")
    ask(tab, "quick")
    page.locator("#new-chat").click()
    choose(tab, "Expert")
    ask(tab, "deep")
    page.get_by_role("button", name="quick", exact=True).click()
    expect(page.get_by_role("radio", name="Instant")).to_be_checked()
    page.get_by_role("button", name="deep", exact=True).click()
    expect(page.get_by_role("radio", name="Expert")).to_be_checked()


def test_reset_leaves_the_other_profile_alone(tab: Any) -> None:
    page = tab.page

    def system(text: str | None) -> str:
        page.get_by_role("button", name="Settings").click()
        field = page.get_by_label("System prompt")
        if text is not None:
            field.fill(text)
        else:
            page.get_by_role("button", name="Reset").click()
        value = field.input_value()
        page.get_by_role("button", name="Done").click()
        return value

    system("Expert's.")
    choose(tab, "Instant")
    system("Instant's.")
    assert system(None) == ""
    choose(tab, "Expert")
    assert ask(tab, "hi")["messages"][0]["content"] == "Expert's."


def test_profiles_are_chosen_by_keyboard(tab: Any) -> None:
    page = tab.page
    page.get_by_role("radio", name="Expert").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("radio", name="Instant")).to_be_checked()
    expect(page.get_by_role("switch", name="DeepThink")).to_have_attribute("aria-checked", "false")
