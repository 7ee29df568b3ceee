// Renders the description of the interface. The key that a reader enters stays in the page.

/* global SwaggerUIBundle */
SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#reference",
  deepLinking: true,
  // The description is not sent to a validator of another origin.
  validatorUrl: null,
});
