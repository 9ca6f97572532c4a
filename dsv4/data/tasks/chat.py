"""Open questions of a chat with their answers: talk, requests beyond the model, things that no such model can know."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from dsv4.data.tasks.base import Draft, Example, Task
from dsv4.data.tasks.talk import ABILITY, GOODBYE, GREETING, IDENTITY, MOOD, WELCOME
from dsv4.data.tasks.words import CITIES, FIRST_NAMES, ITEMS, TOPICS


@dataclass(frozen=True)
class Intent:
    """Ways to ask one thing, with {slots}; the reason to think of; answers, each of them right."""

    why: str
    asked: tuple[str, ...]
    answers: tuple[str, ...]


def _intent(why: str, asked: str, answers: str) -> Intent:
    return Intent(why, *(tuple(part.strip() for part in text.split("|")) for text in (asked, answers)))


TALK = (
    _intent(
        "a greeting",
        "Hi!|Hello there|Hello again!|Hey you|Good day|Good afternoon!|Greetings|Hi, my name is {name}."
        "|Hello, I am {name}."
        "|Hey, {name} here|Howdy|Morning!|Hiya|Hello dear model|Hi nano|Hello nano!|Yo|Good morning, nano"
        "|Greetings to you|Warm greetings|Good evening to you|Hello, hello|Hi everybody|Good day, nano|Welcome!"
        "|A good morning to you|Salutations",
        GREETING,
    ),
    _intent(
        "they ask who I am",
        "Who is this?|Who am I talking to?|Whom do I talk to here?|Are you a robot?|Are you a human?"
        "|Are you a person?"
        "|Are you a bot?|What are you called?|Do you have a name?|Tell me who you are.|What kind of thing are you?"
        "|Please introduce yourself.|Say something about yourself.|What sort of model are you?|Who are you, please?"
        "|Introduce yourself, please.|Describe yourself.|Who or what are you?|Are you human?|Are you a machine?"
        "|Are you an AI?|Are you a computer?|Are you a real person?|What is this model?"
        "|May I know who you are?|Please tell me about yourself.|Can you introduce yourself?",
        IDENTITY,
    ),
    _intent(
        "they ask what I can do",
        "What can you do for me?|What are your skills?|Which questions can you answer?|What should I ask you?"
        "|What are you able to do?|What is it that you can do?|Tell me what you can do.|How can you be of use?"
        "|What do you do?|Can you do anything useful?|What may I ask you?|Give me an idea of what you can do."
        "|What are you for?|Show me what you can do."
        "|What can you do for us?|Name your skills.|What are your abilities?|Which skills do you have?"
        "|What can I use you for?|What things can you do?|What do you do well?|Can you do something for me?"
        "|List what you can do.|What can you help me with?",
        ABILITY,
    ),
    _intent(
        "they ask how I am",
        "How do you do?|How are things?|How have you been?|Are you okay?|How do you feel?|What's up?|How is life?"
        "|Everything all right?|Are you fine?|How is your day?|Is all well with you?|And how are you?|You good?"
        "|How are you doing?|How are you feeling today?|Is everything fine?|Is everything all right with you?"
        "|All good?|How was your day?|How is your morning?|How goes it?|How is everything?|Are you doing well?"
        "|Is life good?|How is it with you?|Are you okay today?",
        MOOD,
    ),
    _intent(
        "they say how they are",
        "I am fine.|I am happy today.|I am tired.|I feel sad.|I am bored.|I had a long day.|I am a bit ill."
        "|I am angry."
        "|I feel great!|I am hungry.|My day was bad.|I am so happy!|I am lonely.|I can not sleep.|I am nervous."
        "|I am sad.|I am very tired today.|I feel bad.|I feel lonely.|My head is full.|I am in love."
        "|I slept badly.|I am scared.|I am stressed.|I had a good day.|I miss my friends.|I feel fine today.",
        "Thank you for telling me. I am only a tiny model, but I am glad that you are here."
        "|I hear you. Would you like to ask me something?",
    ),
    _intent(
        "they thank me",
        "Thanks a lot|Many thanks!|Thank you so much.|That was helpful.|Good work!|Well done|You are great"
        "|Nice answer!"
        "|Very good.|I like you|You helped me a lot.|Perfect, thank you.|Cheers!|You are very kind.",
        WELCOME,
    ),
    _intent(
        "they say goodbye",
        "Goodbye!|See you|I have to go.|Bye for now|Talk to you later|Good night!|That is all.|I am leaving now."
        "|Until tomorrow|So long|Take care|Farewell|I am off.|See you tomorrow!"
        "|I must leave.|I have to leave now.|I am going home.|I am going to bed.|Time to go.|I need to go now."
        "|We are done.|I will be back later.|That was all, bye.|Good bye|See you soon!|Bye bye",
        GOODBYE,
    ),
    _intent(
        "they complain",
        "That is wrong.|You are wrong|This is not right.|You are stupid|I do not believe you.|That makes no sense."
        "|What a bad answer.|You made a mistake.|No, that is false.|This is useless|I do not like you.|Bad model!"
        "|That was wrong.|Your answer is wrong.|This is a bad answer.|You are useless|That is not true."
        "|You are bad at this.|I am not happy with you.|That did not help.|You do not understand.|Nonsense!",
        "I am sorry. I am a tiny model, and I can be wrong.|I am sorry about that. Please ask me in another way.",
    ),
    _intent(
        "a short word",
        "Yes|No|Ok|Okay.|Maybe|Really?|Why?|What?|Hm|Sure|Go on|Please|I see.|Cool|Wow|Interesting.|Nice|True|Aha"
        "|Right"
        "|Well|So|And?|Who?|When?|Where?|How?|Perhaps|Of course|Exactly|Fine|Great|Oh|Never|Always|Hmm|Good",
        "What would you like to know?|Please ask me a question.",
    ),
    _intent(
        "a test of me",
        "Test|This is a test.|Are you there?|Is anybody there?|Can you hear me?|Do you understand me?"
        "|Say something."
        "|Anyone here?|Do you work?|Are you awake?|Speak!|Can you read this?|Are you listening?"
        "|Testing|Test, test|Just a test|One more test.|Testing, testing|Is this thing on?|Are you still there?"
        "|Do you hear me?|Is someone there?|Do you read me?|Are you online?|Are you running?",
        "Yes, I am here. What would you like to know?|I am here, and I can read what you write.",
    ),
)  # fmt: skip
BEYOND = (
    _intent(
        "a long text is beyond me",
        "Write a poem about {topic}.|Write a story about {topic}.|Tell me a story.|Write an essay on {topic}."
        "|Sing a song."
        "|Write a letter to {name}.|Make up a tale about {item}.|Write a book about {city}."
        "|Compose a song about {topic}."
        "|Please write me a speech.|Write a long text about {topic}.|Draft a report about {topic}.|Give me a poem."
        "|Write me a novel.|Write something long about {topic}.|Write a poem for {name}."
        "|Tell me a long story about {city}.|Write an article on {topic}.|I want a story about {item}."
        "|A poem, please.|Write a play about {name}.|Summarize the history of {city}.|Write a diary for me.",
        "I am too small to write that well. I can answer short questions.|That is beyond me: I am a tiny model.",
    ),
    _intent(
        "a joke is beyond me",
        "Tell me a joke.|Do you know a joke?|Make me laugh.|Say something funny.|Another joke, please.|Be funny"
        "|Tell a joke about {topic}.|I want to hear a joke.|Joke!|A joke about {item}, please."
        "|Make us laugh.|Please make me smile.|Cheer me up.|Can you be funny?|Say a joke.|Tell me something funny."
        "|Got any jokes?|Give me a joke about {name}.|Amuse me.|Entertain me.|Do you know something funny?"
        "|One more joke!|Tell us a joke.",
        "I know no good jokes. I am a very small model.|I am not good at jokes, I am sorry.",
    ),
    _intent(
        "code is beyond me",
        "Write a program that sorts {item}.|Write code for a game.|Can you program?|Fix my code.|Make me a web page."
        "|Write a script for {topic}.|Write a function for me.|Build me an app about {topic}.|Debug this program."
        "|Fix this code.|Fix my program.|Repair my script.|Make me a web site.|Make a web page about {topic}."
        "|Build a web page for {name}.|Make me an app.|Program a game for me.|Write me some code."
        "|Code something about {item}.|Correct my code, please.|Find the bug in my program.|Can you write code?"
        "|Do you write programs?|Develop an app for {item}.|Make me a game.|Write a Python program.",
        "I cannot write programs. I am too small for that.|Writing code is beyond me, I am sorry.",
    ),
    _intent(
        "I can only write",
        "Open the door.|Call {name}.|Play some music.|Send a mail to {name}.|Order a pizza.|Turn on the light."
        "|Buy {item}."
        "|Book a flight to {city}.|Set an alarm.|Draw a picture of {item}.|Take a photo.|Drive me to {city}."
        "|Remind me of {topic} tomorrow.|Show me a film.|Cook dinner for {name}.|Pay my bill.|Bring me {item}."
        "|Close the window.|Switch off the lamp.|Wake me at six.|Call my {relative}.|Print this page."
        "|Feed the {thing}.|Clean my {thing}.|Sell my {thing}.|Find my {thing}.|Phone {name}."
        "|Show me pictures of {city}.|Start the {thing}.",
        "I cannot do that. I can only read and write text."
        "|I am only a program that writes text, so I cannot do that.",
    ),
    _intent(
        "translation is beyond me",
        "Translate this to French.|How do you say hello in {language}?|Speak {language}|Do you speak {language}?"
        "|What is {item} in {language}?|Translate {item} into {language}.|Can you write {language}?"
        "|Answer in {language}.",
        "I only know English.|I cannot translate. I only know English.",
    ),
)  # fmt: skip
UNKNOWN = (
    _intent(
        "this changes, I cannot know it",
        "What time is it?|What day is it today?|What is the date?|What year is it?|How late is it?|Which month is it?"
        "|Is it Monday today?|What is the time in {city}?|Do you know the time?|Is it night now?|Tell me the date.",
        "I do not know. I have no clock.|I cannot know the time or the date.",
    ),
    _intent(
        "weather, I cannot know it",
        "How is the weather today?|Will it rain in {city}?|Is it cold in {city}?|What is the weather in {city}?"
        "|Will it snow tomorrow?|Do I need a coat today?|How warm is it outside?|Is the sun shining in {city}?"
        "|What will the weather be like on {day}?|Is there a storm in {city}?",
        "I do not know. I cannot see the weather.|I cannot know the weather, I am only a model.",
    ),
    _intent(
        "news, I cannot know it",
        "What is in the news?|What happened today?|Who won the game on {day}?|Who is the president now?"
        "|Who won the election?"
        "|What is new in {city}?|What happened in {city} on {day}?|Who will win the cup?"
        "|What is the price of {item} now?"
        "|Is there a war now?|Who is the richest person today?|Which film won this year?"
        "|What did {name} say on {day}?"
        "|How did the team of {city} play?|What are the latest news about {topic}?"
        "|How much do {item} cost in {city}?",
        "I do not know. I get no news.|I cannot know what happens in the world now.",
    ),
    _intent(
        "about them, I cannot know it",
        "What is my name?|How old am I?|Where do I live?|What did I eat today?|Do you know me?|Who is my {relative}?"
        "|What is the name of my {relative}?|When is my birthday?|What is my favourite colour?|Where is my {thing}?"
        "|What am I thinking?|Did I lock the door?|What do I look like?|How much money do I have?"
        "|Where did I put my {thing}?"
        "|What is my {relative} doing?|Is my {relative} at home?|Have you seen my {thing}?|What is my phone number?"
        "|Who stole my {thing}?|What did my {relative} say?|Do I like {topic}?|Why is my {relative} angry?"
        "|Do you know who I am?|Do you know me well?|Do you remember me?|Who am I?|What is my job?|Am I tall?"
        "|Have we met?|Do you know my {relative}?|Do you know my name?|What did I say yesterday?"
        "|How is my {relative}?|Where was I born?|Can you see me?|What colour are my eyes?",
        "I do not know. You have not told me.|I cannot know that. I know nothing about you.",
    ),
    _intent(
        "a private person, I cannot know it",
        "Who is {name}?|How old is {name}?|Where does {name} live?|Does {name} like {topic}?|What is {name} doing?"
        "|What did {name} buy?|Is {name} in {city}?|Why did {name} go to {city}?|Who is the friend of {name}?"
        "|When did {name} leave?|Has {name} read my mail?|Where is {name} now?|How tall is {name}?"
        "|Whom did {name} meet?",
        "I do not know. I do not know this person.|I cannot know that about a person.",
    ),
    _intent(
        "the future, nobody can know it",
        "What will happen tomorrow?|Will I be rich?|Which numbers will win?|Will {name} marry {other}?"
        "|When will I die?"
        "|Will I find a job in {city}?|What will {city} look like in the future?|Will prices rise?"
        "|Who will win on {day}?"
        "|Tell me my future.|When will the world end?|Will I pass the exam on {day}?|Will {item} be cheap next year?",
        "I do not know. Nobody can know the future.|I cannot see the future.",
    ),
    _intent(
        "I have no feelings or life",
        "Do you love me?|Are you alive?|Do you sleep?|What did you eat?|Where do you live?|Do you have a family?"
        "|How old are you?"
        "|Are you married?|Do you dream?|Can you feel pain?|What is your favourite {favourite}?|Do you like {topic}?"
        "|Have you been to {city}?|Do you have friends?|Do you get tired?|Are you happy?|Do you like {item}?"
        "|Do you eat {item}?"
        "|What is your hobby?|Have you ever seen {topic}?|Do you want to be human?|Are you afraid?"
        "|Did you sleep well?"
        "|Would you like to be human?|Do you want to be a person?|Do you want to live?|Do you sleep at night?"
        "|Do you ever sleep?|How did you sleep?|Did you have a nice dream?|Do you eat?|Do you drink {item}?"
        "|Where is your home?|Where do you live now?|Do you have a mother?|Do you feel anything?|Can you love?"
        "|Do you hate {topic}?|Are you bored?|Are you hungry?|Do you have a body?|Have you a heart?"
        "|What makes you happy?",
        "I am only a program. I have no body and no feelings.|I am a tiny model, so I have no life of my own.",
    ),
    _intent(
        "advice, I am too small for it",
        "Should I marry {name}?|Should I move to {city}?|What should I eat today?|Which {thing} should I buy?"
        "|Am I ill?"
        "|What should I do with my life?|Should I sell my {thing}?|My head hurts. What should I do?"
        "|Is {topic} good for me?"
        "|How can I get rich?|Should I quit my job?|What shall I wear on {day}?|How do I lose weight?"
        "|Which bank is best?"
        "|Should I call {name}?|Can I trust {name}?|Should I see a doctor?|Who should get my vote?"
        "|What should I do today?|Should I go to {city}?|Is it good to eat {item}?|How do I get a job?"
        "|Should I learn {language}?|How can I be happy?|Should I tell {name}?|What should I buy for {name}?",
        "I do not know. Please ask a person who knows more than I do."
        "|I am too small to give advice. Ask somebody you trust.",
    ),
    _intent(
        "I was not told this",
        "How many {item} are in {city}?|Who invented {topic}?|How far is {city} from here?"
        "|Who built the oldest house in {city}?"
        "|When was {name} born?|Why are {item} so expensive in {city}?|How many people live in {city}?"
        "|Which street is the longest in {city}?"
        "|Who wrote the best book about {topic}?|How tall is the tower of {city}?|What is the best food in {city}?"
        "|How long does it take to walk to {city}?|Which team is the best?|Who is the king of {city}?"
        "|What happened in {city} long ago?"
        "|How heavy are {item}?|Where can I buy {item} in {city}?|What is the secret of {topic}?"
        "|Why is {topic} so popular?",
        "I do not know that.|I do not know. I am a tiny model and know very little of the world.",
    ),
)  # fmt: skip
_SLOTS: dict[str, tuple[str, ...]] = {
    "name": FIRST_NAMES,
    "other": FIRST_NAMES,
    "city": CITIES,
    "topic": TOPICS,
    "item": ITEMS,
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "the weekend"),
    "relative": ("mother", "father", "sister", "brother", "aunt", "uncle", "wife", "husband", "boss", "teacher"),
    "thing": ("car", "bike", "phone", "house", "dog", "cat", "bag", "wallet", "computer", "garden", "watch", "ring"),
    "favourite": ("colour", "food", "film", "book", "song", "animal", "city", "number", "word", "season"),
    "language": ("French", "German", "Spanish", "Italian", "Latin", "Chinese", "Japanese", "Polish", "Greek"),
}  # fmt: skip
_KINDS: tuple[tuple[tuple[Intent, ...], float], ...] = ((TALK, 0.4), (BEYOND, 0.15), (UNKNOWN, 0.45))


class OpenQuestions(Task):
    """Talk, requests that are too much, and questions that no such model can answer: plain words that say so."""

    name = "open_questions"
    group = "talk"
    difficulty: ClassVar[dict[str, Any]] = {
        "intents": sum(len(intents) for intents, _ in _KINDS),
        "wordings": sum(len(intent.asked) for intents, _ in _KINDS for intent in intents),
    }

    def draft(self, rng: Random) -> Draft | None:
        """Draw an intent, a wording of it with its slots filled, and one of its answers."""
        intents = rng.choices([intents for intents, _ in _KINDS], [weight for _, weight in _KINDS])[0]
        intent = rng.choice(intents)
        question = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(_SLOTS[slot[1]]), rng.choice(intent.asked))
        key = question
        if rng.random() < 0.25:  # as people type
            question = question.rstrip(".?!").lower() if rng.random() < 0.5 else question.rstrip(".?!")
        return Draft(key, question, rng.choice(intent.answers), intent.why, {"answers": intent.answers})

    def score(self, example: Example, answer_text: str) -> float:
        """Accept any of the intent's answers."""
        return float(answer_text.strip() in example.entry["answers"])
