// Follows the configuration of docs/clients.md, which makes `client`. Prints what a scenario gave as JSON.
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const model = "deepseek-flash";
const Color = z.object({ color: z.enum(["red", "blue"]) });
const city = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const weather = { type: "function", function: { name: "weather", description: "Weather of a city", parameters: city } };
const color = { type: "object", properties: { color: { enum: ["red", "blue"] } }, required: ["color"] };
const paint = { type: "function", function: { name: "paint", parameters: color } };
const ask = (messages, options = {}) => client.chat.completions.create({ model, messages, ...options });
const user = (content) => ({ role: "user", content });

async function loop(messages, options = {}) {
  for (;;) {
    const answer = await ask(messages, { tools: [weather], ...options });
    const message = answer.choices[0].message;
    messages.push(message);
    if (!message.tool_calls?.length) return message.content;
    for (const call of message.tool_calls) {
      const { city } = JSON.parse(call.function.arguments);
      messages.push({ role: "tool", tool_call_id: call.id, content: `sun in ${city}` });
    }
  }
}

const scenarios = {
  async chat() {
    const answer = await ask([user("Hello")]);
    const { content, reasoning_content } = answer.choices[0].message;
    return { text: content, reasoning: reasoning_content, tokens: answer.usage.total_tokens };
  },
  async stream() {
    const found = { text: "", reasoning: "" };
    const stream = await ask([user("Hello")], { stream: true, stream_options: { include_usage: true } });
    for await (const chunk of stream) {
      const delta = chunk.choices[0]?.delta ?? {};
      found.text += delta.content ?? "";
      found.reasoning += delta.reasoning_content ?? "";
      found.tokens = chunk.usage?.total_tokens;
    }
    return found;
  },
  async tools() {
    const messages = [user("Weather in Oslo?")];
    const text = await loop(messages);
    messages.push(user("And tomorrow?"));
    return { text, later: await loop(messages) };
  },
  async streamed_tools() {
    const runner = client.chat.completions.runTools({
      model, stream: true, messages: [user("Weather in Oslo?")],
      tools: [{ type: "function", function: { ...weather.function, parse: JSON.parse,
        function: ({ city }) => `sun in ${city}` } }],
    });
    return { text: await runner.finalContent() };
  },
  async forced() {
    const given = [];
    for (const choice of ["required", { type: "function", function: { name: "paint" } }]) {
      const answer = await ask([user("A color")], { tools: [paint], tool_choice: choice });
      const call = answer.choices[0].message.tool_calls[0].function;
      given.push({ name: call.name, ...JSON.parse(call.arguments) });
    }
    return given;
  },
  async structured() {
    const options = { model, messages: [user("A color")], response_format: zodResponseFormat(Color, "color") };
    const answer = await client.chat.completions.parse(options);
    return [answer.choices[0].message.parsed];
  },
  async refused() {
    const error = await client.chat.completions.create({ model: "none", messages: [user("Hi")] }).catch((e) => e);
    return { status: error.status, message: error.message };
  },
};
console.log(JSON.stringify(await scenarios[process.argv[2]]()));
